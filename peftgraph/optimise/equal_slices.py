"""Computes once, on a whole value, what is computed alike on slices of it: the rotary embedding of q and of k.

f(y[:a], z), f(y[a:b], z)   ->   split(f(y[:b], z))      where f treats each place along that axis alike
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from peftgraph.optimise.clean_up import argument_key, remove_unused, same_sizes, share_equal_nodes, value_of
from peftgraph.optimise.insertion import Inserter

aten = torch.ops.aten
UNARY = {
    aten.neg.default,
    aten.silu.default,
    aten.gelu.default,
    aten.relu.default,
    aten.tanh.default,
    aten.sigmoid.default,
}
BINARY = {aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.div.Tensor}


@dataclass(frozen=True)
class Slice:
    """Places `start` to `stop` of a value along an axis, which is counted from the first."""

    base: fx.Node
    axis: int
    start: int
    stop: int


@dataclass(frozen=True)
class Lift:
    """A call on slices, as one on whole values.

    Attributes:
        node: the call.
        key: equal for calls that differ only in which places they read.
        axis: of the result, along which it has the same places.
        start: the first of these places in the result's units.
        stop: the end of them.
        sizes: for a view, its sizes on the whole values.
    """

    node: fx.Node
    key: Any
    axis: int
    start: int
    stop: int
    sizes: Any = None


def join_equal_slices(graph: fx.Graph) -> None:
    """Replace, in place, equal calls on neighbouring slices by one call."""
    slices = {node: one for node in graph.nodes if (one := _split_part(node)) is not None}
    make, moved = Inserter(graph), list[fx.Node]()
    while runs := _neighbours(graph, slices):
        for run in runs:
            new = _on_whole_values(make, run, slices)
            for one in run:
                slices[one.node] = Slice(new, one.axis, one.start - run[0].start, one.stop - run[0].start)
                moved.append(one.node)
    _take_slices(make, moved, slices)
    share_equal_nodes(graph)
    remove_unused(graph)


def _split_part(node: fx.Node) -> Slice | None:
    split = node.args[0] if node.target is operator.getitem else None
    if not isinstance(split, fx.Node) or split.target is not aten.split_with_sizes.default or split.kwargs:
        return None
    base, widths, *rest = split.args
    axis, number = (rest[0] if rest else 0), node.args[1]
    if not isinstance(base, fx.Node) or not isinstance(number, int) or not all(type(one) is int for one in widths):  # pyright: ignore
        return None
    start = sum(widths[:number])  # pyright: ignore
    return Slice(base, axis % value_of(base).dim(), start, start + widths[number])  # pyright: ignore


def _neighbours(graph: fx.Graph, slices: Mapping[fx.Node, Slice]) -> list[list[Lift]]:
    """Return runs of equal calls on slices that follow one another."""
    groups: dict[Any, list[Lift]] = defaultdict(list)
    for node in graph.nodes:
        if node.op == "call_function" and node not in slices and (one := _lift(node, slices)) is not None:
            groups[one.key].append(one)
    found: list[list[Lift]] = []
    for group in groups.values():
        run: list[Lift] = []
        for one in sorted(group, key=lambda one: one.start):
            if not run or run[-1].stop != one.start:
                run = []
                found.append(run)
            run.append(one)
    return [run for run in found if len(run) > 1]


def _lift(node: fx.Node, slices: Mapping[fx.Node, Slice]) -> Lift | None:
    read = [slices[one] for one in node.all_input_nodes if one in slices]
    if not read or len({(one.axis, one.start, one.stop) for one in read}) > 1:
        return None
    first, sizes, scale = read[0], None, 1
    if node.target is aten.view.default:
        sizes = _view_of_last_axis(node, first)
        axis = None if sizes is None else first.axis
        scale = 1 if sizes is None else sizes[-1]
    else:
        axis = _result_axis(node, first, slices)
    if axis is None:
        return None
    template = map_arg(node.args, lambda one: slices[one].base if one in slices else one)
    key = (node.target, argument_key(template if sizes is None else (template[0], sizes)),
           argument_key(tuple(sorted(node.kwargs.items()))), first.axis)  # fmt: skip
    return Lift(node, key, axis, first.start // scale, first.stop // scale, sizes)


def _result_axis(node: fx.Node, part: Slice, slices: Mapping[fx.Node, Slice]) -> int | None:
    """Return the axis along which the result has the places of the slices; None if it mixes them."""
    rank, target, args = value_of(part.base).dim(), node.target, node.args
    if target in UNARY:
        return part.axis
    if target in BINARY:
        others = [one for one in args if one not in slices]
        return part.axis if all(_is_alike_along(one, part.axis, rank) for one in others) else None
    if target is aten.transpose.int:
        i, j = (axis % rank for axis in args[1:3])
        return {i: j, j: i}.get(part.axis, part.axis)
    if target in (aten.slice.Tensor, aten.roll.default, aten.cat.default):
        return part.axis if _keeps_axis(node, part, rank, slices) else None
    return None


def _keeps_axis(node: fx.Node, part: Slice, rank: int, slices: Mapping[fx.Node, Slice]) -> bool:
    """Return True if a slice, a rotation or a concatenation is along another axis."""
    if node.kwargs:
        return False
    if node.target is aten.cat.default:
        operands: Any = node.args[0]
        axis: Any = node.args[1] if len(node.args) > 1 else 0
        return all(one in slices for one in operands) and axis % rank != part.axis
    if node.target is aten.roll.default:
        axes: Any = node.args[2] if len(node.args) > 2 else []
        return bool(axes) and all(axis % rank != part.axis for axis in axes)
    return len(node.args) > 1 and node.args[1] % rank != part.axis  # pyright: ignore


def _is_alike_along(operand: Any, axis: int, rank: int) -> bool:
    value = value_of(operand)
    if not isinstance(value, Tensor):
        return True
    place = axis - (rank - value.dim())
    return value.dim() <= rank and (place < 0 or (isinstance(value.shape[place], int) and value.shape[place] == 1))


def _view_of_last_axis(node: fx.Node, part: Slice) -> list[Any] | None:
    """Return the sizes of a view that only splits the last axis, for the whole value; None for any other."""
    base, value = value_of(part.base), value_of(node)
    sizes: Any = node.args[1]
    if part.axis != base.dim() - 1 or value.dim() != base.dim() + 1 or type(sizes[-1]) is not int or sizes[-1] < 1:
        return None
    if not same_sizes(value.shape[:-2], base.shape[:-1]) or part.start % sizes[-1] or part.stop % sizes[-1]:
        return None
    return [*sizes[:-2], -1, sizes[-1]] if -1 not in sizes[:-2] else None


def _on_whole_values(make: Inserter, run: list[Lift], slices: Mapping[fx.Node, Slice]) -> fx.Node:
    """Insert the call of which the results of some calls are slices."""
    first, last = run[0].node, run[-1].node
    place = {node: i for i, node in enumerate(make.graph.nodes)}
    with make.graph.inserting_before(min((one.node for one in run), key=place.__getitem__)):
        made: dict[fx.Node, fx.Node] = {}
        for one, end in zip(_slices_in_order(first, slices), _slices_in_order(last, slices), strict=True):
            low, high = slices[one], slices[end]
            made[one] = low.base
            if (low.start, high.stop) != (0, value_of(low.base).shape[low.axis]):
                made[one] = make.call(aten.slice.Tensor, low.base, low.axis, low.start, high.stop)
        args: Any = map_arg(first.args, lambda one: made.get(one, one))
        args = args if run[0].sizes is None else (args[0], run[0].sizes)
        return make.call(first.target, *args, **first.kwargs)


def _slices_in_order(node: fx.Node, slices: Mapping[fx.Node, Slice]) -> list[fx.Node]:
    found: list[fx.Node] = []
    map_arg(node.args, lambda one: found.append(one) if one in slices else None)
    return found


def _take_slices(make: Inserter, moved: list[fx.Node], slices: Mapping[fx.Node, Slice]) -> None:
    """Let the readers of calls that were replaced read slices of the new values."""
    together: dict[tuple[fx.Node, int], list[fx.Node]] = defaultdict(list)
    for node in moved:
        together[slices[node].base, slices[node].axis].append(node)
    for (base, axis), nodes in together.items():
        widths = [slices[node].stop - slices[node].start for node in nodes]
        with make.graph.inserting_before(base.next):
            parts = make.call(aten.split_with_sizes.default, base, widths, axis)
            for i, node in enumerate(nodes):
                node.replace_all_uses_with(make.call(operator.getitem, parts, i))
