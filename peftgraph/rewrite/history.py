"""Finds passes in the history of a program: by index, by the name that they were given, or by their word."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from peftgraph.errors import Ambiguous, PeftGraphError
from peftgraph.ir.program import AppliedPass

Names = str | Iterable[str]


def position_of(history: Sequence[AppliedPass], which: int | str) -> int:
    """Return the index of one pass.

    Raises:
        PeftGraphError: there is no such pass.
        Ambiguous: several passes have the word.
    """
    if isinstance(which, str):
        found = positions_of(history, which)
        if len(found) > 1 and not history[found[0]].name:
            raise Ambiguous(f"{len(found)} passes are {which!r}; remove one by its number in the history: {found}.")
        return found[0]
    if not -len(history) <= which < len(history):
        raise PeftGraphError(f"There is no pass number {which}; {len(history)} were applied.")
    return which % len(history)


def positions_of(history: Sequence[AppliedPass], which: str) -> list[int]:
    """Return the indices of the passes of a name, or if there are none, of the unnamed passes with that word.

    Raises:
        PeftGraphError: there are neither.
    """
    found = [i for i, applied in enumerate(history) if applied.name == which]
    found = found or [i for i, one in enumerate(history) if not one.name and one.method.word == which]
    if not found or not which:
        known = [applied.name or applied.method.word for applied in history]
        raise PeftGraphError(f"No pass is called {which!r}. Applied: {known}.")
    return found


def flat_names(names: Iterable[Names]) -> list[str]:
    """Return names that were given one by one or in lists."""
    return [name for one in names for name in ([one] if isinstance(one, str) else one)]
