"""Rows of keys and values led into an attention that a model writes out, whatever the order of its axes.

Of the rows alone the scores are worked out as the model does its own; both stand side by side where the softmax is
taken, and what follows is done to both together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, cast

import torch
from torch import fx

from peftgraph.errors import PeftGraphError
from peftgraph.ir.builder import Builder
from peftgraph.rewrite.attention.biases import MASKS, Shares
from peftgraph.rewrite.attention.layout import HINT, axes_of, laid_out
from peftgraph.rewrite.match import Match
from peftgraph.rewrite.sequence.axes import ELEMENTWISE, GONE, REDUCED, axis_after
from peftgraph.sites.dataflow import ops
from peftgraph.sites.dataflow.products import factors, spelled

aten = torch.ops.aten

Bias = Callable[[fx.Node], fx.Node | None]  # of a mask or bias: what of it falls on some keys, or nothing
SCALES: Final = ops.SCALE | ops.CAST | {"contiguous", "clone"}
SIZED: Final = ops.words("view reshape _unsafe_view expand")
MASKING: Final = ops.words("masked_fill where add sub")


def refusal(m: Match, node: fx.Node) -> PeftGraphError:
    """Return the error that rows cannot be carried past a node."""
    label = node.meta.get("label", node.name)
    return PeftGraphError(
        f"{m.site.id} computes its attention by way of %{label} ({node.target}), past which no rows of keys and values "
        f"can be led. {HINT}"
    )


class Written:
    """One attention of the form softmax(q k^T) v, and rows for it: keys and values (1 or B, G, L, D)."""

    def __init__(self, m: Match, op: Builder, keys: fx.Node, values: fx.Node) -> None:
        self.m, self.op, self.keys, self.values = m, op, keys, values
        self.product, self.core = m.names[m.site.ports["product"]], m.names[m.site.op]
        own = self.core.args[0] if ops.is_softmax(self.core) else m.names[m.site.ports["scores"]]
        assert isinstance(own, fx.Node), self.core
        self.scores, self.output = _before_level(own), m.names[m.port("output")]

    def computed(self, shares: Shares | None) -> fx.Node:
        """Return the attention's output with the rows prepended; without `shares`, that of the rows alone."""
        raw, axis = self._own_scores()
        front, axis = self._led(self.product, self.scores, {self.product: raw}, axis, (shares or Shares()).front)
        v, axes = self.m.value("v"), axes_of(self.m, "v")
        rows = laid_out(self.op, self.values, axes, v)
        if shares is None:
            copies = {self.scores: front, v: rows}
        else:
            base = self._with_input(shares)
            own, _ = self._led(self.product, self.scores, {self.product: base}, self._axis(), shares.own)
            both = self.op.call(aten.cat.default, [front, own], axis)
            copies = {self.scores: both, v: self.op.call(aten.cat.default, [rows, v], axes.positions)}
        return self._led(self.scores, self.output, copies, axis, None)[0]

    def _axis(self) -> int:
        """Return the axis of the keys among the scores."""
        named, side = spelled(self.product), self._side()
        assert named is not None, self.product
        letter = named.of(side)[axes_of(self.m, "scored").positions]
        if letter not in named.result:
            raise PeftGraphError(
                f"{self.m.site.id} weighs features, each with a number for every position, and not positions: a row of "
                "keys would need as many numbers as there are positions. Choose attentions over positions with at=."
            )
        return named.result.index(letter)

    def _side(self) -> int:
        """Return which factor of the scores k is."""
        sides, q = factors(self.product), self.m.value("q")
        if sides is None or q not in sides or sides[0] is sides[1]:
            raise refusal(self.m, self.product)
        return 1 if sides[0] is q else 0

    def _own_scores(self) -> tuple[fx.Node, int]:
        """Return q P_K^T, scaled as the model scales its keys before the product, and the axis of the rows."""
        op, axis, side = self.op, self._axis(), self._side()
        k = (factors(self.product) or ())[side]
        rows = laid_out(op, self.keys, axes_of(self.m, "scored"), k)
        if ops.name(self.product) == "baddbmm":
            own = op.call(aten.bmm.default, *([self.m.value("q"), rows] if side else [rows, self.m.value("q")]))
            own = op.mul(own, self.product.kwargs.get("alpha", 1))  # pyright: ignore[reportArgumentType]
        else:
            own = op.copy_call(self.product, {k: rows})
        start = self.m.names[self.m.site.ports["k"]]
        way = [start, *_tensors(op.nodes_between(start, k))] if start is not k else []
        for node in way[1:]:
            if ops.name(node) in SCALES and node.meta["val"].dim() == k.meta["val"].dim():
                signal = next(one for one in node.all_input_nodes if one in way)
                own = op.copy_call(node, {signal: own})
        return own, axis

    def _with_input(self, shares: Shares) -> fx.Node:
        """Return the model's own scores, with its share of the bias that a baddbmm adds."""
        if ops.name(self.product) != "baddbmm" or self.product.kwargs.get("beta", 1) == 0:
            return self.product
        bias = self.product.args[0]
        assert isinstance(bias, fx.Node), self.product
        own = shares.own(bias)
        return self.product if own is bias else self.op.copy_call(self.product, {bias: own})

    def _led(
        self, start: fx.Node, stop: fx.Node, copies: dict[fx.Node, fx.Node], axis: int, bias: Bias | None
    ) -> tuple[fx.Node, int]:
        """Repeat the model's computation between two values on copies of them; return the result and its axis of keys.
        `bias`: the part of masks and biases for these keys; without it, none may occur."""
        axes = {start: axis}
        if start is stop:
            return copies[start], axis
        for node in _tensors(self.op.nodes_between(start, stop)):
            signals = [one for one in node.all_input_nodes if one in axes and axes[one] != GONE]
            if not signals:
                axes[node], copies[node] = GONE, self._again(node, copies)
                continue
            found = axis_after(node, signals[0], axes[signals[0]])
            if ops.name(node) in MASKING:
                found = axes[signals[0]] + node.meta["val"].dim() - signals[0].meta["val"].dim()
            if found is None or (found == GONE and (bias is not None or not self._may_end(node, stop))):
                raise refusal(self.m, node)
            axes[node], copies[node] = found, self._copy(node, signals, copies, found, bias)
        return copies[stop], axes[stop]

    def _may_end(self, node: fx.Node, stop: fx.Node) -> bool:
        return node is stop or ops.name(node) not in ops.CONTRACTION

    def _copy(
        self, node: fx.Node, signals: list[fx.Node], copies: dict[fx.Node, fx.Node], axis: int, bias: Bias | None
    ) -> fx.Node:
        others = _tensors(one for one in node.all_input_nodes if one not in copies)
        if node.target in MASKS and others and bias is not None:
            found = {one: bias(one) for one in others}
            new = {one: value for one, value in found.items() if value is not None}
            if not new and node.meta["val"].dim() != signals[0].meta["val"].dim():
                raise refusal(self.m, node)
            signal = copies[signals[0]]
            return self._again(node, new | {signals[0]: signal}) if new else signal
        if ops.name(node) in SIZED:
            return self._viewed(node, signals[0], copies, axis)
        if ops.name(node) in ELEMENTWISE | MASKING and not all(_is_one_for_all_keys(one, node, axis) for one in others):
            raise refusal(self.m, node)
        return self._again(node, copies)

    def _again(self, node: fx.Node, copies: Mapping[fx.Node, fx.Node]) -> fx.Node:
        """Return the call of `node` with other operands, or `node` itself where they are the same."""
        same = all(copies.get(one, one) is one for one in node.all_input_nodes)
        return node if same else self.op.copy_call(node, copies)

    def _viewed(self, node: fx.Node, source: fx.Node, copies: Mapping[fx.Node, fx.Node], axis: int) -> fx.Node:
        """Apply a view to a copy with another number of keys: axes are merged or split, except the keys'."""
        if copies[source] is source:
            return node
        before = next(one for one in range(source.meta["val"].dim()) if axis_after(node, source, one) == axis)
        size = copies[source].meta["val"].shape[before]
        sizes: list[Any] = list(cast("list[Any]", node.args[1]))
        sizes[axis] = size if isinstance(size, int) else self.op.call(aten.sym_size.int, copies[source], before)
        target = aten.expand.default if ops.name(node) == "expand" else aten.reshape.default
        return self.op.call(target, copies[source], sizes)


def _before_level(scores: fx.Node) -> fx.Node:
    """Return the score before the maximum over a query's keys, which is the same for all of them, is subtracted."""
    if ops.name(scores) != "sub" or not all(isinstance(one, fx.Node) for one in scores.args[:2]):
        return scores
    plain, level = cast("tuple[fx.Node, fx.Node]", scores.args[:2])
    while ops.name(level) in ops.CAST | {"detach", "clone", "expand", "getitem"}:
        level = level.all_input_nodes[0]
    return plain if ops.name(level) in REDUCED and plain in level.all_input_nodes else scores


def _tensors(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """Return the nodes whose values are tensors, not sizes."""
    return [node for node in nodes if isinstance(node.meta["val"], torch.Tensor)]


def _is_one_for_all_keys(operand: fx.Node, node: fx.Node, axis: int) -> bool:
    shape = operand.meta["val"].shape
    place = axis - (node.meta["val"].dim() - len(shape))
    return place < 0 or shape[place] == 1
