"""What the axes of an attention's operands hold, found from where the features of their projections arrive."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import fx

from peftgraph.sites.assign.attention import Attention
from peftgraph.sites.dataflow.flow import Flow
from peftgraph.sites.dataflow.products import MixedTagger, Spelled, factors, spelled
from peftgraph.sites.dataflow.tags import Tags, varies
from peftgraph.sites.matchers.anatomy import Anatomy
from peftgraph.sites.matchers.arrivals import arrivals, by_row
from peftgraph.sites.site import Axes


def operand_axes(anatomy: Anatomy, one: Attention) -> dict[str, Axes]:
    """Return the axes of q, of k as it is multiplied ("scored"), of v and of the output of an attention's core; without
    those that have no words."""
    core = one.core
    k = _Operand(anatomy, core.k, core.features[1]).axes(core.positions[0])
    v = _Operand(anatomy, core.v, core.features[2]).axes(core.positions[1])
    q = _queries(anatomy, one)
    found = {"q": q, "scored": k, "v": v, "output": _output(anatomy.flow, one, q, v)}
    return {port: axes for port, axes in found.items() if axes is not None}


@dataclass(frozen=True)
class _Operand:
    """A value, and which of its axes hold the features of one head."""

    anatomy: Anatomy
    value: fx.Node
    features: Sequence[int]

    @cached_property
    def sizes(self) -> Sequence[object]:
        return self.anatomy.flow.value(self.value).shape

    @cached_property
    def others(self) -> list[int]:
        """Its axes without features."""
        rank = len(self.sizes)
        return [axis for axis in range(rank) if axis not in {one % rank for one in self.features}]

    @cached_property
    def tags(self) -> Tags | None:
        """The features that arrive, on `others` and one axis of features; None where none do."""
        sources = self.anatomy.frontier(self.value).projections
        tags = by_row(arrivals(self.anatomy, self.value, sources)[0], self.features) if sources else None
        return tags if tags is not None and tags.dim() == len(self.others) + 1 and bool(tags.any()) else None

    def differs(self, axis: int) -> bool:
        """Tell whether different features arrive at different positions of an axis."""
        return self.tags is not None and varies(self.tags, self.others.index(axis))

    def axes(self, positions: int | None) -> Axes | None:
        """Return the words of its axes; None where heads lie on them in no way that has words."""
        if positions is None or positions % len(self.sizes) not in self.others:
            return None
        positions %= len(self.sizes)
        if self._by_feature(positions):
            return self._swapped(positions)
        rest = [axis for axis in self.others if axis != positions]
        heads = [axis for axis in rest if self.differs(axis)]
        if self.tags is None and len(self.sizes) == 4 and self.others == [0, 1, positions]:
            heads = [axis for axis in (1,) if isinstance(self.sizes[axis], int) and self.sizes[axis] != 1]
        if len(heads) > 1:
            return None
        words = ["d"] * len(self.sizes)
        words[positions] = "t"
        for axis in rest:
            words[axis] = "1" if isinstance(self.sizes[axis], int) and self.sizes[axis] == 1 else "b"
        if not heads:
            return Axes(tuple(words), 1)
        spelt = _spelt(self._numbers(heads[0], positions), isinstance(self.sizes[heads[0]], int))
        if spelt is None:
            return None
        words[heads[0]] = spelt[0]
        return Axes(tuple(words), spelt[1])

    def _by_feature(self, positions: int) -> bool:
        """Tell whether attention is over channels: it weights features, each a vector over positions."""
        if self.tags is None or self.tags.shape[-1] == 1 or not self.differs(positions):
            return False
        return not varies(self.tags, self.tags.dim() - 1)

    def _swapped(self, positions: int) -> Axes | None:
        if len(self.features) > 1:
            return None
        return _Operand(self.anatomy, self.value, (positions,)).axes(self.features[0])

    def _numbers(self, axis: int, positions: int) -> list[int]:
        """Return the number of the head at each place of an axis, at a position of which most is known."""
        if self.tags is None:
            return list(range(self.anatomy.flow.shape(self.value)[axis]))
        rows = self.tags.movedim((self.others.index(axis), self.others.index(positions)), (0, 1))
        rows = rows[(slice(None), slice(None), *[0] * (rows.dim() - 3))]
        known = int((rows != 0).sum(dim=(0, 2)).argmax())
        numbers: dict[tuple[int, ...], int] = {}
        return [numbers.setdefault(tuple(row), len(numbers)) for row in rows[:, known].tolist()]


def _spelt(ids: Sequence[int], written: bool) -> tuple[str, int] | None:
    """Return how heads are laid out on an axis, and their number; `written`: whether its size is a number."""
    size, heads = len(ids), max(ids) + 1
    if heads == size:
        return "h", heads
    if list(ids) == [i // (size // heads) for i in range(size)]:
        return ("(h r)" if written else "(h b)"), heads
    return ("(b h)", heads) if list(ids) == [i % heads for i in range(size)] else None


def _queries(anatomy: Anatomy, one: Attention) -> Axes | None:
    """Return the axes of q; its positions are on an axis of its own along which no features differ."""
    operand = _Operand(anatomy, one.core.q, one.core.features[0])
    named, side = _scored(one)
    if named is None:
        return operand.axes(-2)
    own = [named.of(side).index(letter) for letter in named.own(side)]
    plain = [axis for axis in own if not operand.differs(axis)]
    return operand.axes(plain[-1]) if plain else None


def _scored(one: Attention) -> tuple[Spelled | None, int]:
    """Return the letters of q k^T, and which factor q is; None for an attention in one operator."""
    products = one.core.products
    sides = factors(products[0]) if products else None
    return (spelled(products[0]) if products else None), 0 if sides and sides[0] is one.core.q else 1


def _output(flow: Flow, one: Attention, q: Axes | None, v: Axes | None) -> Axes | None:
    """Return the axes of softmax(q k^T) v: features and heads are where v has them, or heads where q has them."""
    core = one.core
    if not core.products:
        return None if q is None or q.words[-1] != "d" else q
    named, sides = spelled(core.output), factors(core.output)
    if named is None or sides is None or q is None or v is None:
        return None
    side = 0 if sides[0] is core.v else 1
    words = ["b"] * len(named.result)
    for letter, word in zip(named.of(side), v.words, strict=True):
        if letter in named.result:
            words[named.result.index(letter)] = "h" if word == "(h r)" else word
    for word in ("t", "h") if "h" not in " ".join(words) and q.heads > 1 else ("t",):
        place = _arrived(flow, one, q, named, 1 - side, word)
        if place is None:
            return None
        words[place[0]] = place[1]
    sizes = flow.shape(core.output)
    return Axes(tuple("1" if word == "b" and n == 1 else word for word, n in zip(words, sizes, strict=True)), q.heads)


def _arrived(flow: Flow, one: Attention, q: Axes, named: Spelled, side: int, word: str) -> tuple[int, str] | None:
    """Return the position in the output of an axis of the scores that comes from q, and its form there."""
    scored, of_q = _scored(one)
    weights = (factors(one.core.output) or ())[side]
    axis = next((i for i, text in enumerate(q.words) if word in text), None)
    if scored is None or axis is None:
        return None
    product, place = one.core.products[0], scored.result.find(scored.of(of_q)[axis])
    shape = flow.shape(product)
    ids = torch.arange(shape[place])
    ids = ids if word == "t" else ids % q.heads if q.words[axis] == "(b h)" else ids // (shape[place] // q.heads)
    seed = (ids + 1).reshape([-1 if i == place else 1 for i in range(len(shape))]).expand(shape)
    tags = MixedTagger(flow, {product: seed}).run(weights)
    found = [i for i in range(tags.dim()) if varies(tags, i)]
    if len(found) != 1 or tags.shape != flow.shape(weights) or named.of(side)[found[0]] not in named.result:
        return None
    numbers = tags[tuple(slice(None) if i == found[0] else 0 for i in range(tags.dim()))] - 1
    written = isinstance(flow.value(weights).shape[found[0]], int)
    spelt = ("t", 0) if word == "t" else _spelt(numbers.tolist(), written)
    return None if spelt is None else (named.result.index(named.of(side)[found[0]]), spelt[0])
