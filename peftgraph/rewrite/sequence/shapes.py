"""Axes of shapes: which of them grew, and which a view leaves as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peftgraph.ir.shape_inference import example_size
from peftgraph.rewrite.sequence.token_inputs import same_size

Size = Any  # int or torch.SymInt


def grown(before: Sequence[Size], after: Sequence[Size], rows: int) -> frozenset[int] | None:
    """The axes that are longer by `rows`; None where a size changed in another way."""
    if len(before) != len(after):
        return None
    differences = [_difference(a, b) for a, b in zip(before, after, strict=True)]
    if any(one not in (0, rows) for one in differences):
        return None
    return frozenset(axis for axis, one in enumerate(differences) if one == rows)


def groups(before: Sequence[Size], after: Sequence[Size]) -> list[tuple[list[int], list[int]]]:
    """The axes of a view that belong together, in the operand and in the result; those of size 1 belong to none."""
    old, new = (
        [(axis, example_size(size) or 0) for axis, size in enumerate(sizes) if example_size(size) != 1]
        for sizes in (before, after)
    )
    found: list[tuple[list[int], list[int]]] = []
    while old and new:
        (i, left), (j, right) = old.pop(0), new.pop(0)
        ins, outs = [i], [j]
        while left != right and (old if left < right else new):
            axis, size = old.pop(0) if left < right else new.pop(0)
            if left < right:
                ins, left = [*ins, axis], left * size
            else:
                outs, right = [*outs, axis], right * size
        found.append((ins, outs))
    return found


def told(*sizes: Size) -> str:
    """Sizes for a message, as the traced example has them."""
    return " x ".join(str(example_size(size) or size) for size in sizes)


def _difference(before: Size, after: Size) -> int | None:
    """after - before, where it is one number."""
    if same_size(before, after):
        return 0
    if isinstance(before, int) and isinstance(after, int):
        return after - before
    old, new = (size if isinstance(size, int) else size.node.expr for size in (before, after))
    difference: Any = new - old
    difference = difference.expand()
    return int(difference) if difference.is_Integer else None
