"""Provenance by execution: run data movement on integer tags and read which features arrive where.

A seed replaces one node's value by a tensor of tags (0 = none). Layout operators run as themselves on the
example's sizes; elementwise operators, norms and depthwise convolutions pass on the tag of their tagged operand
(the first, where two are tagged); reductions and products erase. Only the nodes between seeds and goal are run.
Tags stay views of their seed wherever they can: an axis along which a seed does not vary has stride 0 and costs
nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from peftgraph.sites.dataflow import ops
from peftgraph.sites.dataflow.flow import Flow, hint

Tags = torch.Tensor
PAIR = 2**31
KEPT = ops.words("contiguous clone alias detach lift_fresh_copy")  # layouts that leave every tag where it is


class Tagger:
    """Runs tags through a graph; one instance per question, so nothing is kept.

    `last`: of two tagged operands the last one's tag wins, which shows what the other way round hides.
    """

    def __init__(self, flow: Flow, seeds: Mapping[fx.Node, Tags], last: bool = False) -> None:
        self.flow = flow
        self.last = last
        self.env: dict[fx.Node, Any] = dict(seeds)
        self._sources = 0
        for node in seeds:
            self._sources |= flow.bit(node)

    def run(self, goal: fx.Node) -> Tags:
        """Return the tags that arrive at `goal`."""
        todo = [goal]
        while todo:
            node = todo[-1]
            missing = [one for one in self.flow.operands(node) if one not in self.env and self._reached(one)]
            if node in self.env:
                todo.pop()
            elif missing:
                todo.extend(missing)
            else:
                self.env[todo.pop()] = self._evaluate(node)
        value = self.env[goal]
        return value if isinstance(value, torch.Tensor) else torch.zeros(())

    def _reached(self, node: fx.Node) -> bool:
        return bool(self.flow.before(node) & self._sources)

    def _evaluate(self, node: fx.Node) -> Any:
        if not self._reached(node):
            return self._blank(node)
        kind = ops.name(node)
        if kind in ops.LAYOUT:
            try:
                return self._move(node, kind)
            except (RuntimeError, IndexError, TypeError, ValueError, NotImplementedError):
                return self._pass(node)
        if self.flow.channelwise(node):
            return self._by_channel(node)
        if kind in ops.CONTRACTION or kind in ops.CONV or kind in ops.SDPA or kind in ops.REDUCTION:
            return self._blank(node)
        if kind == "glu":
            return self._halves(node)
        return self._pass(node)

    def _blank(self, node: fx.Node) -> Any:
        value = self.flow.value(node)
        if isinstance(value, (list, tuple)):
            return [_zeros([hint(s) for s in part.shape]) for part in value]
        return _zeros(self.flow.shape(node))

    def _operand(self, node: fx.Node) -> Any:
        if not self.flow.carries_tensor(node):
            return hint(self.flow.value(node))
        if node in self.env:
            return self.env[node]
        if not self.flow.floating(node) and self.flow.constant(node):
            return self._index(node)
        return self._blank(node)

    def _index(self, node: fx.Node) -> Any:
        """Return an integer tensor that no input decides (positions, a literal index), at the example's sizes."""
        if node.op == "get_attr":
            stored = self.flow.tensors.get(str(node.target))
            plain = stored is not None and not stored.is_meta and not isinstance(stored, FakeTensor)
            return stored if plain else self._blank(node)
        target: Any = node.target
        inputs: Any = fx.map_arg((node.args, dict(node.kwargs)), self._operand)
        try:
            return target(*inputs[0], **inputs[1])
        except (RuntimeError, IndexError, TypeError, ValueError, NotImplementedError):
            return self._blank(node)

    def _move(self, node: fx.Node, kind: str) -> Any:
        inputs: Any = fx.map_arg((node.args, dict(node.kwargs)), self._operand)
        args, kwargs = inputs
        if kind in KEPT:
            return args[0]
        if kind == "getitem":
            return args[0][args[1]]
        if kind in ("view", "_unsafe_view", "view_as", "reshape_as"):
            return args[0].reshape(self.flow.shape(node))
        if kind in ops.COMPLEX:
            return self._complex(kind, args[0])
        target: Any = node.target
        moved = target(*args, **kwargs)
        if kind == "index" and any(self._unknown(one) for one in self.flow.operands(node)[1:]):
            last = [[None if i is None else torch.full_like(i, -1) for i in args[1]]]
            if bool((target(args[0], *last) != moved).any()):
                return self._blank(node)  # which features arrive depends on values nobody knows here
        return moved

    def _unknown(self, node: fx.Node) -> bool:
        return not self.flow.floating(node) and not self.flow.constant(node)

    def _complex(self, kind: str, value: Tags) -> Tags:
        """Return a complex number carries the tags of the pair it was made of, in one integer."""
        if kind == "view_as_complex":
            return value[..., 0] * PAIR + value[..., 1]
        return torch.stack((value // PAIR, value % PAIR), dim=-1)

    def _halves(self, node: fx.Node) -> Tags:
        value = self._operand(self.flow.operands(node)[0])
        axis = ops.argument(node, 1, "dim")
        return value.chunk(2, dim=axis if isinstance(axis, int) else -1)[0]

    def _by_channel(self, node: fx.Node) -> Tags:
        """Return the tags behind a depthwise convolution: features stay; the first position it mixes stands for all."""
        shape = self.flow.shape(node)
        value = self._operand(self.flow.operands(node)[0])
        spatial = len(self.flow.shape(self.flow.operands(node)[1])) - 2
        for axis in range(-spatial, 0):
            value = value.narrow(axis, 0, 1)
        channel = -spatial - 1
        return value.repeat_interleave(shape[channel] // value.shape[channel], dim=channel).expand(shape)

    def _pass(self, node: fx.Node) -> Any:
        """Elementwise: the first (or last) tagged operand's tag wins; shapes that do not broadcast are erased."""
        shape = self.flow.shape(node)
        result: Tags | None = None
        if not isinstance(self.flow.value(node), torch.Tensor):
            return self._blank(node)
        operands = self.flow.operands(node)
        for source in reversed(operands) if self.last else operands:
            value = self.env.get(source)
            if not isinstance(value, torch.Tensor):
                continue
            try:
                spread = value.expand(shape)
            except RuntimeError:
                continue
            if result is None:
                result = spread
            elif not _same_memory(spread, result):
                result = torch.where(result == 0, spread, result)
        return _zeros(shape) if result is None else result


def _same_memory(a: Tags, b: Tags) -> bool:
    return a.data_ptr() == b.data_ptr() and a.stride() == b.stride()


def _zeros(shape: Sequence[int]) -> Tags:
    """Return zero tags, without using memory."""
    return torch.zeros((), dtype=torch.int64).expand(list(shape))


def squeeze_constant(tags: Tags) -> Tags:
    """Drop every axis along which the tags do not change (batch, positions, repeated heads)."""
    for axis in range(tags.dim() - 1, -1, -1):
        if not varies(tags, axis):
            tags = tags.select(axis, 0)
    return tags


def varies(tags: Tags, axis: int) -> bool:
    """Tell whether the tags change along an axis."""
    if tags.shape[axis] == 0:
        return True
    for other in range(tags.dim()):  # compared once where they are stored once
        if tags.stride(other) == 0 and tags.shape[other] > 0:
            tags = tags.narrow(other, 0, 1)
    return tags.shape[axis] > 1 and not bool((tags == tags.narrow(axis, 0, 1)).all())


def in_order(tags: Tags) -> torch.Tensor:
    """Return the distinct tags by first appearance, without 0: a LongTensor."""
    kept = squeeze_constant(tags).flatten()
    if not bool((kept[1:] > kept[:-1]).all()):
        distinct, number = torch.unique(kept, return_inverse=True)
        first = torch.full_like(distinct, len(kept)).scatter_reduce(0, number, torch.arange(len(kept)), "amin")
        kept = distinct[first.argsort()]
    return kept[kept != 0]


def along(shape: Sequence[int], axes: Sequence[int], base: int = 0) -> Tags:
    """Return tags that number the features along `axes` (flattened in that order) from base + 1."""
    sizes = [shape[axis] for axis in axes]
    count = 1
    for size in sizes:
        count *= size
    tags = torch.arange(base + 1, base + count + 1).reshape(sizes)
    spread = [1] * len(shape)
    positive = [axis % len(shape) for axis in axes]
    for axis, size in zip(positive, sizes, strict=True):
        spread[axis] = size
    order = sorted(range(len(axes)), key=lambda i: positive[i])
    return tags.permute(order).reshape(spread).expand(list(shape))
