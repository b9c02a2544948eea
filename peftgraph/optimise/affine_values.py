"""Joins the products of a sum into one: a value that is affine in x, over stored tensors, is one product with x.

    x W^T + s (x A^T) B^T   ->   x (W + s B A)^T          where that takes no more multiplications

The new matrix is computed from the stored ones once (`stages.py`). This adds up in another order, and rounds the
matrix, so that it is done in single and double precision only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from peftgraph.optimise.clean_up import hint, remove_unused, value_of
from peftgraph.optimise.insertion import Inserter
from peftgraph.optimise.stages import Stage, stages_of

aten = torch.ops.aten
DTYPES = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Affine:
    """A value x W^T + b.

    Attributes:
        x: what it is affine in; None for a constant b.
        weight: the node of W (O, I), inserted; None for a constant.
        bias: the node of b (O,) or one that broadcasts to it; None for zero.
        nodes: the calls that compute the value as it was written.
        cost: the multiplications of a row, as it was written.
    """

    x: fx.Node | None
    weight: fx.Node | None
    bias: Any
    nodes: frozenset[fx.Node]
    cost: int


class AffineValues:
    """Finds the affine values of a graph, and the tensors W and b of each."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph, self.make = graph, Inserter(graph)
        self.stages = stages_of(graph)
        self.forms: dict[fx.Node, Affine] = {}

    def join(self) -> None:
        """Replace, in place, each value of several products by one product."""
        last: list[tuple[fx.Node, Affine]] = []
        for node in list(self.graph.nodes):
            if node.op != "call_function" or self.stages.get(node) is not Stage.VALUES:
                continue
            form = self._form(node)
            if form is not None:
                self.forms[node] = form
                last.append((node, form))
        for node, form in reversed(last):
            if node.users and self._pays(node, form):
                self._replace(node, form)
        remove_unused(self.graph)

    def _form(self, node: fx.Node) -> Affine | None:
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or value.dtype not in DTYPES or node.kwargs:
            return None
        with self.graph.inserting_before(node):
            if node.target is aten.linear.default:
                return self._product(node, *node.args)
            if node.target in (aten.add.Tensor, aten.sub.Tensor):
                return self._sum(node)
            if node.target in (aten.mul.Tensor, aten.div.Tensor):
                return self._scaled(node)
        return None

    def _product(self, node: fx.Node, x: Any, weight: Any, bias: Any = None) -> Affine | None:
        if not self._is_stored(weight) or not (bias is None or self._is_stored(bias)) or value_of(weight).dim() != 2:
            return None
        inner = self.forms.get(x)
        cost = int(value_of(weight).numel())
        if inner is None:
            return Affine(x, weight, bias, frozenset({node}), cost)
        shift = bias
        if inner.bias is not None:
            wide = self._wide(inner.bias, value_of(weight).shape[1])
            shift = self.make.call(aten.mv.default, weight, wide)
            shift = shift if bias is None else self.make.call(aten.add.Tensor, shift, bias)
        joined = self.make.call(aten.mm.default, weight, inner.weight)
        return Affine(inner.x, joined, shift, inner.nodes | {node}, inner.cost + cost)

    def _sum(self, node: fx.Node) -> Affine | None:
        a, b = (self._operand(one, node) for one in node.args)
        if a is None or b is None:
            return None
        if a.x is not None and b.x is not None and a.x is not b.x:
            return None
        weight = self._combined(node.target, a.weight, b.weight)
        shift = self._combined(node.target, a.bias, b.bias)
        shared = a.nodes & b.nodes
        cost = a.cost + b.cost - (min(a.cost, b.cost) if shared else 0)
        return Affine(a.x or b.x, weight, shift, a.nodes | b.nodes | {node}, cost)

    def _combined(self, target: Any, a: Any, b: Any) -> Any:
        if b is None:
            return a
        if a is None:
            return b if target is aten.add.Tensor else self.make.call(aten.neg.default, b)
        return self.make.call(target, a, b)

    def _scaled(self, node: fx.Node) -> Affine | None:
        pair: Any = node.args
        orders = (pair, pair[::-1]) if node.target is aten.mul.Tensor else (pair,)
        for value, factor in orders:
            form = self.forms.get(value) if isinstance(value, fx.Node) else None
            if form is None or not self._is_factor(factor, node):
                continue
            rows = factor
            if isinstance(factor, fx.Node) and value_of(factor).dim():
                rows = self.make.call(aten.unsqueeze.default, factor, -1)
            weight = self.make.call(node.target, form.weight, rows)
            bias = None if form.bias is None else self.make.call(node.target, form.bias, factor)
            return Affine(form.x, weight, bias, form.nodes | {node}, form.cost)
        return None

    def _operand(self, operand: Any, node: fx.Node) -> Affine | None:
        """Return the form of an operand of a sum; a stored vector is a constant."""
        if not isinstance(operand, fx.Node):
            return None
        if operand in self.forms:
            same = value_of(operand).dim() == value_of(node).dim()
            return self.forms[operand] if same and value_of(operand).dtype == value_of(node).dtype else None
        return Affine(None, None, operand, frozenset(), 0) if self._is_factor(operand, node) else None

    def _is_factor(self, operand: Any, node: fx.Node) -> bool:
        """Return True for a number, and for a stored vector along the last axis."""
        if not isinstance(operand, fx.Node):
            return type(operand) in (int, float)
        value = value_of(operand)
        if not self._is_stored(operand) or value.dtype != value_of(node).dtype:
            return False
        return value.dim() == 0 or (value.dim() == 1 and value.shape[0] == value_of(node).shape[-1])

    def _is_stored(self, operand: Any) -> bool:
        return isinstance(operand, fx.Node) and self.stages.get(operand) is Stage.STORED

    def _pays(self, node: fx.Node, form: Affine) -> bool:
        """Return True if one product is not more work than several calls that nothing else reads."""
        if form.weight is None or len(form.nodes) < 2 or form.x is None:
            return False
        if any(user not in form.nodes for one in form.nodes - {node} for user in one.users):
            return False
        return hint(value_of(form.weight).numel()) <= form.cost

    def _replace(self, node: fx.Node, form: Affine) -> None:
        with self.graph.inserting_before(node):
            bias = form.bias
            if bias is not None:
                bias = self._wide(bias, value_of(form.weight).shape[0])
            new = self.make.call(aten.linear.default, form.x, form.weight, *([] if bias is None else [bias]))
        node.replace_all_uses_with(new)

    def _wide(self, bias: Any, width: Any) -> fx.Node:
        """Return a bias with a value for each feature."""
        value = value_of(bias)
        if value.dim() == 1 and value.shape[0] == width:
            return bias
        return self.make.call(aten.expand.default, bias, [width])


def join_affine_values(graph: fx.Graph) -> None:
    """Compute, in place, sums of products of one value with stored matrices as one product."""
    AffineValues(graph).join()
