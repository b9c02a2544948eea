"""Propagation of a longer axis: a sequence gets rows in the middle of a graph, and all that depends on it follows.

A model of pictures has as many positions as a picture has patches. Its length is a number in the traced graph, or
follows from the sizes of the picture, and stands so in the arguments of views. Each such argument on the axis is made
larger, masks over positions are computed again, and operations that the axis cannot be followed through are refused.

Shapes: T positions, L rows.
"""

from __future__ import annotations

import operator
from collections import ChainMap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, fx

from peftgraph.ir.builder import Builder
from peftgraph.ir.ordering import canonical_order
from peftgraph.ir.shape_inference import example_size
from peftgraph.rewrite.match import Match
from peftgraph.rewrite.sequence.axes import END, Size, enlarged_axes, format_sizes, same_size, view_groups
from peftgraph.rewrite.sequence.resized_values import (
    COPIES,
    PIECEWISE,
    Axes,
    ResizedValues,
    broadcast_axes,
    refusal,
    tensors,
)
from peftgraph.sites.dataflow import ops

aten = torch.ops.aten

VIEWS = ops.words("view reshape _unsafe_view")
PARTS = {"split": 2, "split_with_sizes": 2, "chunk": 2, "tensor_split": 2, "unbind": 1, "unflatten": 1}
PRODUCTS = ops.words("matmul bmm mm")
# What goes through these is as long as what they read, with no size of it among their arguments.
PASSED = (
    COPIES
    | ops.DROPOUT
    | ops.NORM
    | ops.REDUCTION
    | ops.SOFTMAX
    | ops.FILLED
    | ops.LIKE
    | ops.words("linear einsum transpose permute t numpy_T mT movedim swapaxes unsqueeze squeeze flatten getitem stack")
    | ops.words("adaptive_avg_pool1d cumsum diagonal zeros ones full arange")
)
# What does the same to every entry of an axis.
WHOLE = COPIES | PIECEWISE | ops.DROPOUT | ops.NORM | {"linear"}
Instead = dict[fx.Node, fx.Node]


@dataclass(frozen=True)
class Joined:
    """An axis that a view made of several, the rows' among them, as batch and positions are joined for a projection.

    Attributes:
        axis: the joined one.
        sizes: those that it was made of, in their order.
        index: which of them has the rows.
    """

    axis: int
    sizes: tuple[Size, ...]
    index: int


class AxisPropagation:
    """The values whose shapes depend on one whose second axis gets L rows more.

    Attributes:
        now: what is longer, with its shape.
        moves: masks and sizes that are read in a longer form from here on, and that form.
        results: what the model returns with the rows, and the axes that they are on; None where these are joined.
    """

    def __init__(self, m: Match, op: Builder, start: fx.Node, extended: fx.Node, rows: int) -> None:
        self.m, self.op, self.rows = m, op, rows
        self.length = start.meta["val"].shape[1]
        self.now: dict[fx.Node, Any] = {start: extended.meta["val"]}
        self.moves: Instead = {}
        self._inside = _after(start) - set(op.nodes)
        self._start = start
        self._readers: dict[fx.Node, set[fx.Node]] = {}
        self._joined: dict[fx.Node, Joined] = {}
        self._resized_values = ResizedValues(m, op, self.length, rows, self._inside)
        for node in list(canonical_order(m.graph)):
            if node in self._inside and node.op == "call_function":
                self._visit(node)
        self._pin_other_readers()
        leaves = [leaf for leaf in m.graph.output_node().all_input_nodes if leaf in self.now]
        self.results = {leaf: None if leaf in self._joined else self.axes(leaf) for leaf in leaves}
        for node, value in self.now.items():
            if node is not start:
                node.meta["val"] = value

    def axes(self, node: fx.Node) -> Axes:
        """Return the axes of a value that the rows are on."""
        return self._axes(node, node.meta["val"], self.now.get(node, node.meta["val"]))

    def _axes(self, node: fx.Node, before: Any, after: Any) -> Axes:
        if not isinstance(before, Tensor) or node in self._joined:
            return frozenset()
        found = enlarged_axes(before.shape, after.shape, self.rows)
        if found is None:
            sizes, new_sizes = (format_sizes(*one.shape) for one in (before, after))
            raise refusal(self.m, node, f"would give {new_sizes} instead of {sizes}, where the rows have no axis")
        return found

    def _visit(self, node: fx.Node) -> None:
        """Find what a call gives, and make the sizes larger that it takes."""
        if self.now.keys().isdisjoint(node.all_input_nodes):
            return
        before = node.meta["val"]
        instead = self._readied(node) if isinstance(before, Tensor | list | tuple) else {}
        values = ChainMap({old: new.meta["val"] for old, new in instead.items()}, self.now)
        try:
            after = self.op.context.inference.value_with(node, values)
        except RuntimeError as error:  # what torch says of sizes that do not fit
            raise refusal(self.m, node, f"does not take {self.rows} positions more: {error}") from None
        if isinstance(before, Tensor):
            self._pass_on(node, before.shape, after.shape)
        pairs = zip(before, after, strict=True) if isinstance(before, list | tuple) else [(before, after)]
        changed = [self._axes(node, *pair) if isinstance(pair[0], Tensor) else not same_size(*pair) for pair in pairs]
        if any(changed) or node in self._joined:
            self.now[node] = after
        for old, new in instead.items():
            self.moves[old] = new
            self._readers.setdefault(old, set()).add(node)

    def _readied(self, node: fx.Node) -> Instead:
        """Return what a call reads instead of some operands, once its own numbers are made larger.

        Raises:
            PeftGraphError: it is not known what the call gives for rows.
        """
        name = ops.name(node)
        if name in VIEWS:
            return self._viewed(node)
        if name == "expand":
            return self._expanded(node)
        self._check_sizes(node)
        if name not in WHOLE and not self._joined.keys().isdisjoint(node.all_input_nodes):
            raise refusal(self.m, node, "takes positions apart that are joined to other axes")
        if name == "sum":
            self._check_sum(node)
        if name in PARTS:
            return self._parted(node, PARTS[name])
        match name:
            case "slice" | "select":
                return self._cut(node, name)
            case "cat":
                axis = cast("int", ops.argument(node, 1, "dim") or 0) % node.meta["val"].dim()
                resized_on = frozenset[int]().union(*map(self.axes, tensors(node))) - {axis}
                return self._agreed(dict.fromkeys(tensors(node), resized_on))
            case _ if name in PIECEWISE:
                return self._broadcast(node)
            case _ if name in PRODUCTS:
                return self._multiplied(node)
            case _ if name in ops.SDPA:
                return self._attended(node)
            case _ if name in PASSED or (name == "flip" and not node.meta["val"].is_floating_point()):
                return {}
            case _ if name in ops.CONV:
                raise refusal(self.m, node, "is a convolution over the positions of a picture, and rows have none")
            case _:
                raise refusal(self.m, node, "is not known to go through with more positions")

    # sizes

    def _viewed(self, node: fx.Node) -> Instead:
        """Resize a view: the axis of the rows stays one of its own, is joined to others, or comes out of a joined
        one."""
        source = cast("fx.Node", node.args[0])
        before, after = (one.meta["val"].shape for one in (source, node))
        axes, joined = self.axes(source), self._joined.get(source)
        wanted, remaining = set[int](), set(axes) | ({joined.axis} if joined else set())
        for ins, outs in view_groups(before, after):
            here = [axis for axis in ins if axis in remaining]
            remaining -= set(here)
            if len(here) == 1 and len(outs) == 1 and (len(ins) > 1 or joined):
                parts = Joined(outs[0], tuple(before[axis] for axis in ins), ins.index(here[0]))
                self._joined[node] = replace(joined, axis=outs[0]) if joined and len(ins) == 1 else parts
                remaining |= {-1} if joined and len(ins) > 1 else set()
            elif here and joined and len(ins) == 1 and _are_same([after[axis] for axis in outs], joined.sizes):
                wanted.add(outs[joined.index])
            elif here and len(ins) == len(outs) == 1:
                wanted.add(outs[0])
            elif here:
                remaining.add(here[0])
        if remaining:
            length, sizes = format_sizes(self.length), format_sizes(*after)
            words = f"lays its {length} positions out as {sizes}, where rows have no position"
            raise refusal(self.m, node, words)
        return self._resized(node, frozenset(wanted))

    def _expanded(self, node: fx.Node) -> Instead:
        """Resize an expansion: where a size follows the rows by itself, what is expanded has them too, or has one
        position."""
        source = cast("fx.Node", node.args[0])
        shift = node.meta["val"].dim() - source.meta["val"].dim()
        resized = frozenset(axis for axis, size in enumerate(cast("Iterable[Any]", node.args[1])) if size in self.now)
        axes = frozenset(axis + shift for axis in self.axes(source)) | resized
        return self._resized(node, axes) | self._agreed({source: broadcast_axes(source, node, axes)})

    def _resized(self, node: fx.Node, axes: Axes) -> Instead:
        """Make the sizes on some axes larger, where they do not follow by themselves."""
        instead: Instead = {}
        kept: set[fx.Node] = set()
        joined, length = self._joined.get(node), example_size(self.length) or 1
        for axis, size in enumerate(cast("Iterable[Any]", node.args[1])):
            times = joined is not None and axis == joined.axis
            if axis not in axes and not times:
                kept |= {size} if isinstance(size, fx.Node) else set()
            elif isinstance(size, fx.Node) and size not in self.now:
                instead[size] = self._joined_size(size) if times else self._resized_values.size(size)
            elif not isinstance(size, fx.Node) and size != -1:
                self.op.enlarge_size(node, 1, axis, self.rows * (size // length if times else 1))
        wrong = next((size for size in kept if size in instead or size in self.now), None)
        if wrong is not None:
            raise refusal(self.m, node, "takes the number of positions for another size as well")
        return instead

    def _joined_size(self, size: fx.Node) -> fx.Node:
        """Return a size that is a multiple of T, as so many times L more."""

        def build() -> fx.Node:
            length = self.op.call(aten.sym_size.int, self._start, 1)
            times = self.op.call(operator.floordiv, size, length)
            return self.op.call(operator.add, size, self.op.call(operator.mul, times, self.rows))

        return self.op.shared_value(f"{size.name} and {self.rows} more in each", build)

    def _pass_on(self, node: fx.Node, before: Sequence[Size], after: Sequence[Size]) -> None:
        """Find a joined axis in what a call gives that reads one."""
        if node in self._joined or len(before) != len(after):
            return
        changed = [axis for axis, pair in enumerate(zip(before, after, strict=True)) if not same_size(*pair)]
        for source in tensors(node) if len(changed) == 1 else []:
            joined = self._joined.get(source)
            if joined is not None:
                sizes = [one.shape[joined.axis] for one in (source.meta["val"], self.now[source])]
                if _are_same(sizes, [before[changed[0]], after[changed[0]]]):
                    self._joined[node] = replace(joined, axis=changed[0])

    def _check_sizes(self, node: fx.Node) -> None:
        """Refuse a call that computes with the number of positions."""
        for one in node.all_input_nodes:
            value = one.meta["val"]
            if not isinstance(value, Tensor | list | tuple) and one not in self.now and same_size(value, self.length):
                raise refusal(self.m, node, "computes with the number of positions")

    def _check_sum(self, node: fx.Node) -> None:
        """Refuse a mean that is written as a sum and a division: the number of positions is written in it."""
        length = example_size(self.length) or 1
        for user in node.users:
            if ops.name(user) in COPIES:
                self._check_sum(user)
            elif ops.name(user) in ops.SCALE and len(user.args) > 1:
                factor = user.args[1]
                written = isinstance(factor, int | float) and any(abs(factor - n) < 1e-9 * n for n in _powers(length))
                if written or (isinstance(factor, fx.Node) and same_size(factor.meta["val"], self.length)):
                    raise refusal(self.m, user, "computes with the number of positions")

    # axes

    def _cut(self, node: fx.Node, name: str) -> Instead:
        """Check a part of an axis of the rows: what the code counts from an end that it does not name is not known."""
        source, *rest = cast("list[Any]", list(node.args))
        defaults = (0, 0, END, 1) if name == "slice" else (0, 0)
        axis, *bounds = (*rest, *defaults[len(rest) :])
        size = source.meta["val"].shape[axis % source.meta["val"].dim()]
        if axis % source.meta["val"].dim() in self.axes(source):
            known = all(
                isinstance(bound, int) and (bound <= 1 or bound >= END or _is_less(bound + 1, size)) for bound in bounds
            )
            if not known or (name == "slice" and bounds[2] != 1):
                raise refusal(
                    self.m, node, f"takes positions by numbers that may be counted from the end of {format_sizes(size)}"
                )
        return {}

    def _parted(self, node: fx.Node, position: int) -> Instead:
        source = cast("fx.Node", node.args[0])
        axis = cast("int", ops.argument(node, position, "dim") or 0)
        if axis % source.meta["val"].dim() in self.axes(source):
            words = f"parts the {format_sizes(self.length)} positions, and it is not known which part has the rows"
            raise refusal(self.m, node, words)
        return {}

    def _broadcast(self, node: fx.Node) -> Instead:
        operands = tensors(node)
        width = node.meta["val"].dim()
        shifts = {one: width - one.meta["val"].dim() for one in operands}
        axes = frozenset(axis + shifts[one] for one in operands for axis in self.axes(one))
        return self._agreed({one: broadcast_axes(one, node, axes) for one in operands})

    def _multiplied(self, node: fx.Node) -> Instead:
        """Extend a product of matrices: both have the rows where they are summed over, or neither."""
        a, b = cast("tuple[fx.Node, fx.Node]", node.args[:2])
        wanted = {a: self.axes(a), b: self.axes(b)}
        for one, axis, other, its in ((a, -1, b, -2), (b, -2, a, -1)):
            dims = [x.meta["val"].dim() for x in (one, other)]
            if dims[0] + axis in self.axes(one) and dims[1] > 1:
                wanted[other] |= {dims[1] + its}
        return self._agreed(wanted)

    def _attended(self, node: fx.Node) -> Instead:
        """Extend attention: a mask has the rows of the queries and of the keys."""
        q, k, v = cast("tuple[fx.Node, fx.Node, fx.Node]", node.args[:3])
        rows = {one: one.meta["val"].dim() - 2 for one in (q, k, v)}
        if any(self.axes(one) - {rows[one]} for one in (q, k, v)):
            raise refusal(self.m, node, "has the positions on another axis than the queries, keys and values")
        wanted = {one: self.axes(one) for one in (q, k, v)}
        if wanted[k] or wanted[v]:
            wanted |= {k: frozenset({rows[k]}), v: frozenset({rows[v]})}
        mask = ops.operand(node, 3, "attn_mask")
        if mask is not None:
            sizes = mask.meta["val"].shape
            on = {len(sizes) - 2: wanted[q], len(sizes) - 1: wanted[k]}
            wanted[mask] = frozenset(axis for axis, has in on.items() if has and not same_size(sizes[axis], 1))
        return self._agreed(wanted)

    def _agreed(self, wanted: Mapping[fx.Node, Axes]) -> Instead:
        """Return longer forms of the operands that lack the rows on some axes."""
        return {one: self._resized_values.resized(one, axes) for one, axes in wanted.items() if axes - self.axes(one)}

    def _pin_other_readers(self) -> None:
        """Let all others read the masks and sizes that they read, where some read longer ones.

        Raises:
            PeftGraphError: something with the rows reads one both ways.
        """
        for value, readers in self._readers.items():
            others = set(value.users) - readers
            both = next((node for node in others if node in self._inside and node in self.now), None)
            if both is not None:
                raise refusal(
                    self.m,
                    both,
                    f"reads %{value.meta.get('label', value.name)} for {format_sizes(self.length)} positions",
                )
            self.op.pinned_users |= others


def _after(start: fx.Node) -> set[fx.Node]:
    """Return everything that depends on a value, by its sizes alone too."""
    found, todo = set[fx.Node](), [start]
    while todo:
        fresh = [user for user in todo.pop().users if user not in found]
        found.update(fresh)
        todo += fresh
    return found


def _are_same(sizes: Sequence[Size], others: Sequence[Size]) -> bool:
    return len(sizes) == len(others) and all(map(same_size, sizes, others))


def _is_less(number: int, size: Size) -> bool:
    """Tell whether a number is less than a size, as the traced example has it; a fixed length may stand as a number."""
    known = example_size(size)
    return known is not None and number < known


def _powers(length: int) -> tuple[float, ...]:
    return (length, 1 / length, length**0.5, length**-0.5)
