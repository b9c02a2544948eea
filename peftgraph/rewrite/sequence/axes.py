"""Axes of values: where an operation puts one, which ones are longer than before, and which a view joins.

All of it is read off shapes and the arguments of calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import fx

from peftgraph.ir.builder import Builder
from peftgraph.ir.shape_inference import example_size
from peftgraph.sites.dataflow import ops
from peftgraph.sites.dataflow.products import spelled

Size = Any  # int or torch.SymInt
END: Final = 2**63 - 1  # of a slice that goes to the end
GONE: Final = -1  # the operation leaves one entry of the axis, or sums over it
RESHAPED: Final = ops.words("view reshape _unsafe_view flatten unflatten expand")
ELEMENTWISE: Final = ops.SCALE | ops.CAST | ops.DROPOUT | ops.words("contiguous clone alias tanh exp add sub clamp_min")
REDUCED: Final = ops.words("sum amax logsumexp")
NORMS: Final = ops.words("layer_norm rms_norm")


def same_size(a: Size, b: Size) -> bool:
    """Tell whether two sizes are one expression."""
    return str(a) == str(b)


def enlarged_axes(before: Sequence[Size], after: Sequence[Size], rows: int) -> frozenset[int] | None:
    """Return the axes that are longer by `rows`; None where a size changed in another way."""
    if len(before) != len(after):
        return None
    differences = [_difference(a, b) for a, b in zip(before, after, strict=True)]
    if any(one not in (0, rows) for one in differences):
        return None
    return frozenset(axis for axis, one in enumerate(differences) if one == rows)


def view_groups(before: Sequence[Size], after: Sequence[Size]) -> list[tuple[list[int], list[int]]]:
    """Return the axes of a view that belong together, in the operand and in the result; those of size 1 belong to
    none."""
    old, new = (
        [(axis, example_size(size) or 0) for axis, size in enumerate(sizes) if example_size(size) != 1]
        for sizes in (before, after)
    )
    found: list[tuple[list[int], list[int]]] = []
    while old and new:
        (i, old_size), (j, new_size) = old.pop(0), new.pop(0)
        ins, outs = [i], [j]
        while old_size != new_size and (old if old_size < new_size else new):
            axis, size = old.pop(0) if old_size < new_size else new.pop(0)
            if old_size < new_size:
                ins, old_size = [*ins, axis], old_size * size
            else:
                outs, new_size = [*outs, axis], new_size * size
        found.append((ins, outs))
    return found


def format_sizes(*sizes: Size) -> str:
    """Format sizes for a message, as the traced example has them."""
    return " x ".join(str(example_size(size) or size) for size in sizes)


def axis_after(node: fx.Node, source: fx.Node, axis: int) -> int | None:
    """Return the axis of `node` that was `axis` of its operand `source`, from the front; GONE where it is no more, and
    None where the operation does something else with it."""
    kind, before, after = ops.name(node), _shape(source), _shape(node)
    if kind in ("transpose", "swapaxes", "permute", "mT", "t"):
        return _order(node, len(before)).index(axis)
    if kind == "expand":
        return axis + len(after) - len(before)
    if kind in RESHAPED:
        return _kept(before, after, axis)
    if kind in ("unsqueeze", "squeeze") and isinstance(node.args[1], int):
        changed = node.args[1] % max(len(before), len(after))
        return (
            None
            if kind == "squeeze" and changed == axis
            else axis + (changed <= axis if kind == "unsqueeze" else -(changed < axis))
        )
    if kind in ELEMENTWISE:
        return axis + len(after) - len(before)
    if kind in ops.SOFTMAX:
        return axis if isinstance(node.args[1], int) and node.args[1] % len(before) == axis else None
    if kind in REDUCED:
        return GONE if _axes(node.args[1], len(before)) == {axis} and True in node.args[2:3] else None
    if kind in NORMS:
        sizes = node.args[1]
        return axis if isinstance(sizes, list | tuple) and axis < len(before) - len(sizes) else None
    if kind == "batch_norm" or kind in ops.CONV:
        return axis if axis > 1 and _pointwise(node, kind) else None
    return _in_product(node, source, axis)


def _shape(node: fx.Node) -> Sequence[Any]:
    return node.meta["val"].shape


def _order(node: fx.Node, rank: int) -> list[int]:
    """Return the axis of the operand that each axis of a transposed value is."""
    if ops.name(node) == "permute":
        order: Any = node.args[1]
        return [axis % rank for axis in order]
    pair = node.args[1:3] if ops.name(node) in ("transpose", "swapaxes") else (-2, -1)
    a, b = (axis % rank for axis in pair if isinstance(axis, int))
    order = list(range(rank))
    order[a], order[b] = b, a
    return order


def _kept(before: Sequence[Any], after: Sequence[Any], axis: int) -> int | None:
    """Return the axis of a view that is whole an axis of what is viewed."""
    for index, size in enumerate(after):
        if same_size(size, before[axis]) and same_size(_product(after[:index]), _product(before[:axis])):
            return index
    return None


def _product(sizes: Sequence[Any]) -> Any:
    result: Any = 1
    for size in sizes:
        result = result * size
    return result


def _axes(axes: Any, rank: int) -> set[int]:
    return {axis % rank for axis in (axes if isinstance(axes, list | tuple) else [axes]) if isinstance(axis, int)}


def _pointwise(node: fx.Node, kind: str) -> bool:
    """Tell whether a convolution or norm of pictures leaves every point alone."""
    kernel = ops.operand(node, 1, "weight")
    plain = kind == "batch_norm" or (kernel is not None and all(size == 1 for size in _shape(kernel)[2:]))
    source = node.args[0]
    return plain and isinstance(source, fx.Node) and _alike(_shape(source)[2:], _shape(node)[2:])


def _alike(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(map(same_size, a, b))


def _in_product(node: fx.Node, source: fx.Node, axis: int) -> int | None:
    named = spelled(node)
    if named is None:
        return None
    operands = [one for one in node.all_input_nodes if isinstance(one.meta["val"], torch.Tensor)]
    side = operands.index(source)
    if side > 1 or ops.name(node) == "baddbmm":
        return None
    letter = named.of(side)[axis]
    return named.result.index(letter) if letter in named.result else GONE


def _difference(before: Size, after: Size) -> int | None:
    """Return after - before, where it is one number."""
    if same_size(before, after):
        return 0
    if isinstance(before, int) and isinstance(after, int):
        return after - before
    old, new = (size if isinstance(size, int) else size.node.expr for size in (before, after))
    difference: Any = new - old
    difference = difference.expand()
    return int(difference) if difference.is_Integer else None


def slice_of(op: Builder, x: fx.Node, axis: int, start: int | fx.Node, stop: int | fx.Node = END) -> fx.Node:
    """Return x from `start` to `stop` on an axis."""
    return op.call(torch.ops.aten.slice.Tensor, x, axis, start, stop)
