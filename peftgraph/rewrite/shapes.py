"""Axes of shapes: which of them grew, and which a view leaves as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peftgraph.ir.propagate import size_in_example
from peftgraph.rewrite.inputs import same_size

Size = Any  # int or torch.SymInt


def grown(before: Sequence[Size], after: Sequence[Size], rows: int) -> frozenset[int] | None:
    """The axes that are longer by `rows`; None where a size changed in another way."""
    if len(before) != len(after):
        return None
    differences = [_difference(a, b) for a, b in zip(before, after, strict=True)]
    if any(one not in (0, rows) for one in differences):
        return None
    return frozenset(axis for axis, one in enumerate(differences) if one == rows)


def partners(before: Sequence[Size], after: Sequence[Size]) -> dict[int, int]:
    """The axes that a view leaves as they are, each with its place in the result; those of size 1 are not told."""
    old, new = (
        [(axis, size_in_example(size) or 0) for axis, size in enumerate(sizes) if size_in_example(size) != 1]
        for sizes in (before, after)
    )
    found: dict[int, int] = {}
    while old and new:
        (i, left), (j, right) = old.pop(0), new.pop(0)
        if left == right:
            found[i] = j
        while left != right and (old if left < right else new):
            if left < right:
                left *= old.pop(0)[1]
            else:
                right *= new.pop(0)[1]
    return found


def told(*sizes: Size) -> str:
    """Sizes for a message, as the traced example has them."""
    return " x ".join(str(size_in_example(size) or size) for size in sizes)


def _difference(before: Size, after: Size) -> int | None:
    """after - before, where it is one number."""
    if same_size(before, after):
        return 0
    if isinstance(before, int) and isinstance(after, int):
        return after - before
    old, new = (size if isinstance(size, int) else size.node.expr for size in (before, after))
    difference = (new - old).expand()
    return int(difference) if difference.is_Integer else None
