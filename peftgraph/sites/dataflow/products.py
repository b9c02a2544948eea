"""Products of two tensors as einsum letters, whatever operator they are written with; and mixings, products of a value
with something the model holds, which keep all but the axes they sum over."""

from __future__ import annotations

import string
from dataclasses import dataclass
from typing import Final

from torch import fx

from peftgraph.sites.dataflow import ops
from peftgraph.sites.dataflow.einsum import letters, operands
from peftgraph.sites.dataflow.flow import Flow
from peftgraph.sites.dataflow.tags import Tagger, Tags

MATRIX: Final = frozenset({"matmul", "bmm", "mm", "baddbmm"})


def factors(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Return the two tensors that a product multiplies; None for every other node."""
    kind = ops.name(node)
    inputs = operands(node) if kind == "einsum" else [one for one in node.args if isinstance(one, fx.Node)]
    if kind == "baddbmm":
        inputs = inputs[1:]
    if (kind not in MATRIX and kind != "einsum") or len(inputs) != 2:
        return None
    return inputs[0], inputs[1]


def is_product(flow: Flow, node: fx.Node) -> bool:
    """Tell whether it is a contraction of two signals."""
    sides = factors(node)
    return sides is not None and all(flow.signal(one) for one in sides)


@dataclass(frozen=True)
class Spelled:
    """A product in letters, as an einsum has them: those of its two factors, and of the result."""

    left: str
    right: str
    result: str

    def of(self, side: int) -> str:
        return (self.left, self.right)[side]

    def own(self, side: int) -> str:
        """Return the letters that this factor alone brings into the result."""
        return "".join(one for one in self.of(side) if one in self.result and one not in self.of(1 - side))

    def summed(self, side: int) -> str:
        """Return the letters of a factor that the product sums over."""
        return "".join(one for one in self.of(side) if one not in self.result)


def spelled(node: fx.Node) -> Spelled | None:
    """Return the letters of a product of two tensors; None where it is none, or has no plain equation."""
    kind, sides = ops.name(node), factors(node)
    if kind == "linear":
        rank = node.meta["val"].dim()
        batch = string.ascii_lowercase[: rank - 1]
        return Spelled(batch + "y", "zy", batch + "z")
    if sides is None:
        return None
    if kind == "einsum":
        named = letters(node)
        return None if named is None else Spelled(named[0][0], named[0][1], named[1])
    ranks = [one.meta["val"].dim() for one in sides]
    if min(ranks) < 2:
        return None
    batch = string.ascii_lowercase[: max(ranks) - 2]
    left, right = (batch[len(batch) - rank + 2 :] for rank in ranks)
    return Spelled(left + "xy", right + "yz", batch + "xz")


@dataclass(frozen=True)
class Mixing:
    """A product of `value` with something that no input decides. `summed`: the axes of the value that it sums over;
    `axes`: for each axis of the result the axis of the value that it is, or None for a new one."""

    node: fx.Node
    value: fx.Node
    summed: tuple[int, ...]
    axes: tuple[int | None, ...]

    def carried(self, flow: Flow, tags: Tags) -> Tags:
        """Return the tags of the axes that are kept; of those that are summed over, the first one's."""
        for axis in self.summed:
            tags = tags.narrow(axis, 0, 1)
        kept = [axis for axis in self.axes if axis is not None]
        dropped = [axis for axis in range(tags.dim()) if axis not in kept]
        tags = tags.permute([*kept, *dropped])[(..., *[0] * len(dropped))]
        for place, axis in enumerate(self.axes):
            if axis is None:
                tags = tags.unsqueeze(place)
        return tags.expand(flow.shape(self.node))


def mixing(flow: Flow, node: fx.Node) -> Mixing | None:
    """Return the mixing that a node is: a linear, product or einsum with one constant factor, or a pointwise
    convolution."""
    kind = ops.name(node)
    if kind in ops.CONV:
        return _pointwise(flow, node)
    named = spelled(node)
    sides = flow.operands(node)[:2] if kind == "linear" else factors(node)
    if named is None or sides is None or flow.constant(sides[0]) == flow.constant(sides[1]):
        return None
    side = 1 if flow.constant(sides[0]) else 0
    mine, other = named.of(side), named.of(1 - side)
    if len(set(mine)) < len(mine):
        return None
    summed = tuple(mine.index(one) for one in mine if one in other and one not in named.result)
    axes = tuple(mine.index(one) if one in mine else None for one in named.result)
    return Mixing(node, sides[side], summed, axes) if summed else None


def _pointwise(flow: Flow, node: fx.Node) -> Mixing | None:
    value, kernel = flow.operands(node)[:2]
    shape, given = flow.shape(node), flow.shape(value)
    plain = flow.constant(kernel) and all(size == 1 for size in flow.shape(kernel)[2:]) and given[2:] == shape[2:]
    return Mixing(node, value, (1,), (0, None, *range(2, len(shape)))) if plain and len(shape) == len(given) else None


class MixedTagger(Tagger):
    """Tags that pass mixings on the axes that these keep."""

    def _evaluate(self, node: fx.Node) -> Tags:
        found = mixing(self.flow, node) if self._reached(node) else None
        tags = self.env.get(found.value) if found is not None else None
        if found is None or tags is None or tags.shape != self.flow.shape(found.value):
            return super()._evaluate(node)
        return found.carried(self.flow, tags)
