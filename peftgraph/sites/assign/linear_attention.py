"""Attention without a softmax over scores: q (k^T v) with any feature maps, and f(q k^T) v with any elementwise f."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from torch import fx

from peftgraph.sites.dataflow import ops
from peftgraph.sites.dataflow.products import MixedTagger, factors, is_product, spelled
from peftgraph.sites.dataflow.tags import along, varies
from peftgraph.sites.matchers.anatomy import Anatomy
from peftgraph.sites.matchers.arrivals import arrivals
from peftgraph.sites.matchers.attention_cores import Core

# What may stand between the two products: elementwise weights, decay and masks, sums over earlier positions.
THROUGH: Final = (
    (ops.LAYOUT | ops.CAST | ops.SCALE | ops.MASKING | ops.DROPOUT | ops.NONLINEAR | {"cumsum"}) - ops.SOFTMAX - {"exp"}
)  # which weights as a softmax does


def find_linear(anatomy: Anatomy) -> list[Core]:
    """Find the cores without a softmax, among the products that no known core is made of."""
    taken = {node for core in anatomy.cores for node in (core.output, *core.products)}
    found: list[Core] = []
    for node in anatomy.flow.nodes:
        if node in anatomy.products and node not in taken:
            core = next(filter(None, (_core(anatomy, node, *way) for way in _ways(anatomy, node, taken))), None)
            found += [] if core is None else [core]
    return found


def _ways(anatomy: Anatomy, node: fx.Node, taken: set[fx.Node]) -> Iterator[tuple[int, fx.Node]]:
    """Yield each factor of a product with the products after it."""
    flow = anatomy.flow
    for side, start in enumerate(factors(node) or ()):
        todo, seen = [start], set[fx.Node]()
        while todo:
            here = todo.pop()
            if here in seen or not flow.floating(here) or here in anatomy.join_at:
                continue
            seen.add(here)
            if is_product(flow, here):
                if here not in taken:
                    yield side, here
            elif ops.name(here) in THROUGH:
                todo.extend(flow.operands(here))


class _Factor:
    """A factor of a product, and which of its axes hold features of projections."""

    def __init__(self, anatomy: Anatomy, value: fx.Node) -> None:

        self.value = value
        frontier = anatomy.frontier(value)
        mixed = any(stop in anatomy.products or stop in anatomy.join_at for stop in frontier.stops)
        self.plain = bool(frontier.projections) and not mixed
        self.tags = arrivals(anatomy, value, frontier.projections)[0] if self.plain else None

    def behind_a_norm(self, anatomy: Anatomy) -> bool:
        """Tell whether a norm is between the projections and the factor, which then is another layer's output."""
        todo, seen = [self.value], set[fx.Node]()
        while todo:
            here = todo.pop()
            if here in anatomy.norm_at:
                return True
            if here not in seen and here not in anatomy.projection_at:
                todo.extend(anatomy.flow.operands(here))
            seen.add(here)
        return False

    def featured(self, axes: Sequence[int]) -> bool:
        """Tell whether features differ along one of some axes."""
        return self.tags is not None and any(varies(self.tags, axis) for axis in axes)


def _core(anatomy: Anatomy, outer: fx.Node, side: int, inner: fx.Node) -> Core | None:
    """Return the core of a product whose one factor comes from another product; None where the axes do not fit."""
    first, last, parts, ends = spelled(inner), spelled(outer), factors(inner), factors(outer)
    if first is None or last is None or parts is None or ends is None or len(last.summed(side)) != 1:
        return None
    met = _met(anatomy, inner, ends[side], last.of(side).index(last.summed(side)))
    if met is None:
        return None
    own, other, third = (_Factor(anatomy, one) for one in (parts[met[0]], parts[1 - met[0]], ends[1 - side]))
    if not all(one.plain and one.tags is not None and one.tags.dim() > 1 for one in (own, other, third)):
        return None
    axis = first.of(met[0]).index(met[1])
    over = [[first.of(i).index(one) for one in first.summed(i)] for i in (met[0], 1 - met[0])]
    weighed = [last.of(1 - side).index(one) for one in last.summed(1 - side)]
    free = [last.of(1 - side).index(one) for one in last.own(1 - side)]
    if own.featured([axis]):
        rest = [first.of(1 - met[0]).index(one) for one in first.own(1 - met[0])]
        if own.featured(over[0]) or not third.featured(weighed) or not other.featured(rest) or third.featured(free):
            return None
        if other.behind_a_norm(anatomy):
            return None
        place = over[0][0] if over[0] else -2
        found = (third, weighed), (own, [axis]), (other, rest)
        return _made(outer, inner, found, (place, place))
    if not (own.featured(over[0]) and other.featured(over[1]) and third.featured(free)) or third.featured(weighed):
        return None
    if third.behind_a_norm(anatomy):
        return None
    return _made(outer, inner, ((other, over[1]), (own, over[0]), (third, free)), (axis, weighed[0]))


Operand = tuple[_Factor, list[int]]  # with the axes that hold its features


def _made(outer: fx.Node, inner: fx.Node, qkv: tuple[Operand, Operand, Operand], positions: tuple[int, int]) -> Core:
    """Return the core with these q, k and v."""
    (q, k, v), (on_q, on_k, on_v) = [one.value for one, _ in qkv], [tuple(axes) for _, axes in qkv]
    return Core(outer, q, k, v, outer, None, (inner,), None, (on_q, on_k, on_v), positions, True)


def _met(anatomy: Anatomy, inner: fx.Node, value: fx.Node, axis: int) -> tuple[int, str] | None:
    """Return which factor of a product has the axis that becomes `axis` of a later value, and its letter."""
    flow, named = anatomy.flow, spelled(inner)
    assert named is not None, inner
    shape = flow.shape(inner)
    for side in (1, 0):
        for letter in named.own(side):
            tags = MixedTagger(flow, {inner: along(shape, (named.result.index(letter),))}).run(value)
            if tags.shape == flow.shape(value) and varies(tags, axis):
                return side, letter
    return None
