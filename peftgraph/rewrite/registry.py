"""Finds passes by their word: those that were registered in this process, and those of installed distributions."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar, cast

from peftgraph.errors import RecipeError, shortened
from peftgraph.rewrite.method import Pass, Pipeline

GROUP = "peftgraph.passes"  # of entry points
HOW_TO_ADD = (
    "A pass of your own becomes known to this process by pg.register(MyPass), and to every process by an entry point "
    f"in the group {GROUP!r}."
)
C = TypeVar("C", bound=type[Pass])

_registered: dict[str, type[Pass]] = {}


def register(cls: C) -> C:
    """Makes a pass known by its word in this process, so that specs, recipes and adapter directories can name it.

    An entry point of the group `peftgraph.passes` does the same for every process that the distribution is installed
    for. A class that is defined again, as in a notebook, takes the place of the earlier one.

    Args:
        cls: a subclass of `peftgraph.authoring.Pass` whose `word` is an identifier.

    Returns:
        The class, so that `register` can be used as a decorator.

    Raises:
        RecipeError: it is no pass, has no word that a spec can spell, or another pass has that word.

    Example:
        ```python
        @pg.register
        @dataclass(frozen=True, kw_only=True)
        class VeRA(Pass):
            word = "vera"
        ```
    """
    if not (isinstance(cls, type) and issubclass(cls, Pass)):
        raise RecipeError(f"register() takes a class of passes, a subclass of peftgraph.authoring.Pass, got {cls!r}.")
    word = cls.word
    if not (isinstance(word, str) and word.isascii() and word.isidentifier()):
        raise RecipeError(f'{_path(cls)} needs a word that specs can spell, such as word = "lora", got {word!r}.')
    taken = _path_of(word)
    if taken is not None and taken != _path(cls):
        raise RecipeError(f"{_path(cls)} cannot have the word {word!r}, which is that of {taken}. Choose another word.")
    _registered[word] = cls
    return cls


@contextmanager
def temporarily_registered(classes: Iterable[type[Pass]]) -> Iterator[None]:
    """Registers passes within a `with` block; afterwards those are known that were known before."""
    before = dict(_registered)
    try:
        for cls in classes:
            register(cls)
        yield
    finally:
        _registered.clear()
        _registered.update(before)


def find_pass(word: str) -> type[Pass]:
    """Returns the pass of that word.

    Raises:
        RecipeError: there is none, or it cannot be imported.
    """
    if word in _registered:
        return _registered[word]
    points = _entry_points()
    if word not in points:
        known = sorted({*points, *_registered})
        close = difflib.get_close_matches(shortened(word), known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise RecipeError(f"There is no pass {shortened(word)!r}.{hint} Known passes: {', '.join(known)}. {HOW_TO_ADD}")
    try:
        return cast(type[Pass], points[word].load())
    except (ImportError, AttributeError) as error:
        raise RecipeError(
            f"The pass {word!r}, which {points[word].value} is to be, cannot be loaded: {error}."
        ) from None


def _entry_points() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}


def _path_of(word: str) -> str | None:
    """Returns the `module:name` of the pass that has a word already; None where it is free."""
    if word == Pipeline.word:
        return _path(Pipeline)
    if word in _registered:
        return _path(_registered[word])
    point = _entry_points().get(word)
    return None if point is None else point.value


def _path(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"
