"""What is known of each type: which are in the zoo, which cannot be built, what is refused and what is missed."""

from __future__ import annotations

import tomllib
from pathlib import Path

from .score import Row

_TABLE = tomllib.loads((Path(__file__).parent / "known.toml").read_text())
# The types of an ordinary run; together they hold every structure that the others have.
CHOSEN: frozenset[str] = frozenset(" ".join(_TABLE["chosen"].values()).split())
# Types that cannot be built small, offline and from a configuration alone -> why.
UNBUILT: dict[str, str] = _TABLE["unbuilt"]
# Types that the tracer refuses -> words of its message.
REFUSED: dict[str, str] = _TABLE["refused"]
# Types with misses -> their number and the cause.
MISSES: dict[str, list[str | int]] = _TABLE["misses"]


def complaints(row: Row) -> list[str]:
    """What differs from what is known: new refusals and misses, and entries of the lists that are out of date."""
    return [*_refusal(row), *([] if row.refusal else _misses(row))]


def _refusal(row: Row) -> list[str]:
    words = REFUSED.get(row.name)
    if words is None:
        return [f"{row.name} is refused: {row.refusal}"] if row.refusal else []
    if not row.refusal:
        return [f"{row.name} is traced now: remove it from [refused] of known.toml"]
    return [] if words in row.refusal else [f"{row.name} is refused for another reason: {row.refusal}"]


def _misses(row: Row) -> list[str]:
    count, cause = MISSES.get(row.name, [0, ""])
    if len(row.misses) == count:
        return []
    if len(row.misses) < int(count):
        return [f"{row.name} has {len(row.misses)} misses now, {count} were known ({cause}): correct known.toml"]
    return [f"{row.name} has {len(row.misses)} misses, {count} are known:", *row.misses]
