"""Resized values: what has an entry for every position and follows from no input, such as a mask, for more positions.

Shapes: T positions, L rows.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, fx

from peftgraph.errors import PeftGraphError
from peftgraph.ir.builder import Builder
from peftgraph.rewrite.match import Match
from peftgraph.rewrite.sequence.axes import END, enlarged_axes, format_sizes, same_size
from peftgraph.rewrite.sequence.token_inputs import reached
from peftgraph.sites.dataflow import ops

aten = torch.ops.aten
Axes = frozenset[int]

COMPARISONS = ops.words("ge gt le lt eq ne")
LOGIC = ops.words("logical_and logical_or logical_not bitwise_and bitwise_or bitwise_not __and__ __or__")
PIECEWISE = ops.SCALE | ops.MASKING | ops.NONLINEAR | COMPARISONS | LOGIC | ops.words("pow by_mode lerp addcmul")
COPIES = ops.CAST | ops.words("contiguous clone detach alias lift_fresh_copy")
FULL = ops.words("zeros ones full new_zeros new_ones new_full")
LIKE = ops.words("zeros_like ones_like full_like")
ENDS: dict[Any, int] = {aten.arange.default: 0, aten.arange.start: 1}


def refusal(m: Match, node: fx.Node, why: str) -> PeftGraphError:
    """Return the error for a value that rows before a block cannot be followed through."""
    label = node.meta.get("label", node.name)
    return PeftGraphError(f"No rows can be prepended to what {m.site.id} reads: %{label} ({ops.name(node)}) {why}.")


def _stored(node: fx.Node) -> Iterator[fx.Node]:
    """Return the stored tensors that a value depends on."""
    seen, todo = {node}, [node]
    while todo:
        fresh = [one for one in todo.pop().all_input_nodes if one not in seen]
        seen.update(fresh)
        todo += fresh
        yield from (one for one in fresh if one.op == "get_attr")


def tensors(node: fx.Node) -> list[fx.Node]:
    """Return the operands of a call that are tensors."""
    return [one for one in node.all_input_nodes if isinstance(one.meta["val"], Tensor)]


class ResizedValues:
    """Values over T positions, for L + T of them.

    They may follow from the sizes of inputs, and compare positions with one another; then a row is a position like
    others. What numbers positions, depends on what an input holds or is stored for T of them, is not known for rows.
    """

    def __init__(self, m: Match, op: Builder, length: Any, rows: int, inside: Collection[fx.Node]) -> None:
        self.m, self.op, self.length, self.rows, self.inside = m, op, length, rows, inside
        self._from_inputs = reached(m.inputs)

    def resized(self, node: fx.Node, axes: Axes, compared: bool = False) -> fx.Node:
        """Return the value with L more positions on some axes.

        Args:
            node: the value.
            axes: where it has a size for every position.
            compared: whether all that is made of it are comparisons.

        Raises:
            PeftGraphError: it is not known for more positions.
        """
        key = f"{node.name} on {sorted(axes)} for {self.rows} more positions, compared: {compared}"
        return self.op.shared_value(key, lambda: self._checked(node, axes, compared))

    def size(self, size: Any) -> Any:
        """Return a size with L more: a number, or a value of the graph; -1 stays what it is."""
        if isinstance(size, fx.Node):
            key = f"{size.name} and {self.rows} more"
            return self.op.shared_value(key, lambda: self.op.call(operator.add, size, self.rows))
        return size if size == -1 else size + self.rows

    def _checked(self, node: fx.Node, axes: Axes, compared: bool) -> fx.Node:
        shape = node.meta["val"].shape
        count = format_sizes(shape[min(axes)])
        if node in self.inside:
            raise refusal(self.m, node, f"stays at {count} positions where it meets more of them")
        if node.op == "get_attr":
            raise PeftGraphError(
                f"No rows can be prepended to what {self.m.site.id} reads: @{node.target}, "
                f"{format_sizes(*shape)}, holds a value for each of {count} positions, and none for rows."
            )
        if node in self._from_inputs:
            raise refusal(self.m, node, "depends on what an input holds for each position")
        new = self._resized(node, axes, compared)
        if new is None or enlarged_axes(shape, new.meta["val"].shape, self.rows) != axes:
            table = next((one for one in _stored(node) if one.meta["val"].dim()), None)
            source = "" if table is None else f", of which @{table.target} holds values, and none for rows"
            raise refusal(self.m, node, f"is known for {count} positions alone{source}")
        return new

    def _resized(self, node: fx.Node, axes: Axes, compared: bool) -> fx.Node | None:
        name = ops.name(node)
        if node.target in ENDS:
            if not compared:
                raise refusal(self.m, node, "numbers the positions, and rows have no number")
            return self._copy(node, {}, ENDS[node.target], None)
        if name in FULL:
            return self._copy(node, {}, int(name.startswith("new_")), axes)
        if name == "expand":
            return self._copy(node, self._operands(node, axes, compared), 1, axes)
        if name in PIECEWISE | COPIES | LIKE:
            sizes = [node.meta["val"].shape[axis] for axis in axes]
            for one in node.args:
                value = one.meta["val"] if isinstance(one, fx.Node) else one
                if not isinstance(value, Tensor) and any(same_size(value, size) for size in sizes):
                    raise refusal(self.m, node, "takes the number of positions for a value")
            return self._copy(node, self._operands(node, axes, compared or name in COMPARISONS))
        if name == "cat":
            return self._joined(node, axes, compared)
        moved = self._moved(node, name, axes)
        source = node.args[0]
        if moved is None or not isinstance(source, fx.Node):
            return None
        return self._copy(node, {source: self.resized(source, moved, compared)})

    def _moved(self, node: fx.Node, name: str, axes: Axes) -> Axes | None:
        """Return the axes in the operand of a change of layout; None where they cannot be told."""
        first, *rest = cast("list[Any]", list(node.args))
        before, after = first.meta["val"].dim() if isinstance(first, fx.Node) else 0, node.meta["val"].dim()
        match name:
            case "unsqueeze":
                new = rest[0] % after
                return None if new in axes else frozenset(axis - (axis > new) for axis in axes)
            case "select":
                gone = rest[0] % before
                return frozenset(axis + (axis >= gone) for axis in axes)
            case "transpose":
                one, other = (axis % before for axis in rest)
                swap = {one: other, other: one}
                return frozenset(swap.get(axis, axis) for axis in axes)
            case "permute":
                return frozenset(rest[0][axis] % before for axis in axes)
            case "slice":
                axis, *bounds = (*rest, *(0, 0, END, 1)[len(rest) :])
                return axes if axis % before not in axes or bounds == [0, END, 1] else None
            case _:
                return None

    def _operands(self, node: fx.Node, axes: Axes, compared: bool) -> dict[fx.Node, fx.Node]:
        """Return longer ones of the operands that are as long as the result, which they are broadcast to."""
        copies: dict[fx.Node, fx.Node] = {}
        for operand in tensors(node):
            own = broadcast_axes(operand, node, axes)
            if own:
                copies[operand] = self.resized(operand, own, compared)
            elif operand in self._from_inputs:
                raise refusal(self.m, operand, "depends on what an input holds, and meets a value for each position")
        return copies

    def _joined(self, node: fx.Node, axes: Axes, compared: bool) -> fx.Node | None:
        """Extend a concatenation: along its own axis the one part that has the positions grows."""
        parts, axis = tensors(node), cast("int", ops.argument(node, 1, "dim") or 0) % node.meta["val"].dim()
        have = [one for one in parts if same_size(one.meta["val"].shape[axis], self.length)]
        if axis in axes and len(have) != 1:
            return None
        wanted = {one: axes if one in have else axes - {axis} for one in parts}
        return self._copy(node, {one: self.resized(one, own, compared) for one, own in wanted.items() if own})

    def _copy(
        self,
        node: fx.Node,
        copies: Mapping[fx.Node, fx.Node],
        position: int | None = None,
        axes: Axes | None = frozenset(),
    ) -> fx.Node:
        """Return the call once more, on longer operands, and with a longer size, or sizes on some axes, at a
        position."""
        arguments: list[Any] = list(node.args)
        if position is not None:
            sizes = arguments[position]
            arguments[position] = (
                self.size(sizes) if axes is None else [self.size(n) if i in axes else n for i, n in enumerate(sizes)]
            )
        arguments, keywords = fx.map_arg((arguments, node.kwargs), lambda operand: copies.get(operand, operand))
        assert not isinstance(node.target, str)
        return self.op.call(node.target, *arguments, **keywords)


def broadcast_axes(operand: fx.Node, result: fx.Node, axes: Axes) -> Axes:
    """Return the axes of an operand that are broadcast to some axes of a result, without those of size 1."""
    sizes = operand.meta["val"].shape
    shift = result.meta["val"].dim() - len(sizes)
    return frozenset(axis - shift for axis in axes if axis >= shift and not same_size(sizes[axis - shift], 1))
