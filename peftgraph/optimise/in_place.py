"""Lets operations write into an operand that nothing reads any more: no new memory, one pass less over it."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from peftgraph.optimise.clean_up import is_view, same_sizes

aten = torch.ops.aten
WRITERS: dict[Any, Any] = {
    aten.add.Tensor: aten.add_.Tensor,
    aten.sub.Tensor: aten.sub_.Tensor,
    aten.mul.Tensor: aten.mul_.Tensor,
    aten.div.Tensor: aten.div_.Tensor,
    aten.add.Scalar: aten.add_.Scalar,
    aten.mul.Scalar: aten.mul_.Scalar,
    aten.div.Scalar: aten.div_.Scalar,
    aten.addmm.default: aten.addmm_.default,
    aten.baddbmm.default: aten.baddbmm_.default,
    aten.neg.default: aten.neg_.default,
    aten.rsqrt.default: aten.rsqrt_.default,
    aten.pow.Tensor_Scalar: aten.pow_.Scalar,
    aten.exp.default: aten.exp_.default,
    aten.silu.default: aten.silu_.default,
    aten.relu.default: aten.relu_.default,
    aten.tanh.default: aten.tanh_.default,
    aten.sigmoid.default: aten.sigmoid_.default,
    aten.masked_fill.Scalar: aten.masked_fill_.Scalar,
}
COMMUTATIVE = {aten.add.Tensor, aten.mul.Tensor}


def write_in_place(graph: fx.Graph) -> None:
    """Turn, in place, operations on a value of this graph into ones that overwrite it, where it is read for the last
    time."""
    memory = _Memory(graph)
    for node in list(graph.nodes):
        if node.target not in WRITERS:
            continue
        for position in (0, 1) if node.target in COMMUTATIVE and not node.kwargs else (0,):
            if memory.may_overwrite(node, position):
                operands = list(node.args)
                operands[0], operands[position] = operands[position], operands[0]
                node.args = tuple(operands)
                node.target = WRITERS[node.target]
                memory.join(node, operands[0])
                break


class _Memory:
    """Which nodes share memory, and when each piece of memory is read for the last time."""

    def __init__(self, graph: fx.Graph) -> None:
        self.place = {node: i for i, node in enumerate(graph.nodes)}
        self.owner: dict[fx.Node, fx.Node] = {}
        self.last_read: dict[fx.Node, int] = {}
        self.own: set[fx.Node] = set()  # owners whose memory this graph has made
        for node in graph.nodes:
            self._add(node)

    def _add(self, node: fx.Node) -> None:
        source = _viewed(node)
        self.owner[node] = self.owner[source] if source is not None else node
        if source is None and _is_fresh(node):
            self.own.add(node)
        last = max((self.place[user] for user in node.users), default=self.place[node])
        owner = self.owner[node]
        self.last_read[owner] = max(self.last_read.get(owner, 0), last)

    def may_overwrite(self, node: fx.Node, position: int) -> bool:
        """Return True if an operand is of the result's form, made here, and not read after this node."""
        operand = node.args[position]
        if not isinstance(operand, fx.Node) or not _same_form(operand, node):
            return False
        owner = self.owner[operand]
        if owner not in self.own or self.last_read[owner] > self.place[node]:
            return False
        others = [one for one in _operands(node) if one is not operand]
        return all(self.owner[one] is not owner for one in others) and _operands(node).count(operand) == 1

    def join(self, node: fx.Node, operand: Any) -> None:
        """Note that a node's value is now in the memory of its operand."""
        old, owner = self.owner[node], self.owner[operand]
        for other, its in self.owner.items():
            if its is old:
                self.owner[other] = owner
        self.last_read[owner] = max(self.last_read[owner], self.last_read[old])


def _operands(node: fx.Node) -> Sequence[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), found.append)
    return found


def _viewed(node: fx.Node) -> fx.Node | None:
    """Return the operand whose memory a node's value may be."""
    if node.op != "call_function":
        return None
    source = node.args[0] if node.args else None
    if node.target is operator.getitem:
        return source if isinstance(source, fx.Node) and isinstance(source.meta.get("val"), list) else None
    return source if is_view(node) and isinstance(source, fx.Node) else None


def _is_fresh(node: fx.Node) -> bool:
    """Return True if a node's value is memory that its operation made."""
    aten_made = isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "aten"
    return node.op == "call_function" and (aten_made or node.target is operator.getitem)


def _same_form(operand: fx.Node, node: fx.Node) -> bool:
    """Return True if two values have the same sizes, strides and dtype, and no entry twice."""
    one, other = operand.meta.get("val"), node.meta.get("val")
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)) or one.dtype != other.dtype:
        return False
    return same_sizes(one.shape, other.shape) and same_sizes(one.stride(), other.stride()) and 0 not in one.stride()
