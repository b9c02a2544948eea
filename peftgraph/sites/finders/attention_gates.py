"""Output gates of attentions: projections that weigh an attention's result before its output projection reads it.

y = W_o (softmax(q k^T) v * f(W_g x)), f an elementwise nonlinearity, with a gate for each feature or for each head
(Qwen3-Next; "Gated Attention for Large Language Models", arXiv 2505.06708, equation 5).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from torch import fx

from peftgraph.sites.assign.attention import Attention, ProjectionPart
from peftgraph.sites.assign.evidence import Step, step, stored, through
from peftgraph.sites.assign.structure import Structure
from peftgraph.sites.dataflow import ops
from peftgraph.sites.dataflow.tags import in_order
from peftgraph.sites.matchers.arrivals import arrivals, columns_of, split
from peftgraph.sites.site import NearMiss, Site

ROLE: Final = "attention.gate"
CONDITIONS: Final = (
    "an attention's result on its way to an output projection",
    "a product with a value that does not come from this result",
    "projections of a signal behind that value",
    "a nonlinearity between them and the product",
)


@dataclass(frozen=True, eq=False)
class Gate:
    """A product of an attention's result and its gate.

    Attributes:
        attention: whose result is gated.
        product: the multiplication.
        value: the factor that is no result of the attention.
        parts: the features of the projections that make it.
    """

    attention: Attention
    product: fx.Node
    value: fx.Node
    parts: tuple[ProjectionPart, ...]


def find(structure: Structure) -> None:
    """Add a site for every gate of every attention's result."""
    for gate in _gates(structure):
        for part in gate.parts:
            if (part.role, part.projection.node, part.columns) not in structure.into.played:
                place = structure.into.place(part.projection.node)
                structure.into.part(part, place, kind=gate.attention.kind)


def evidence(structure: Structure, site: Site, node: fx.Node) -> list[Step]:
    """Say which product of an attention's result a gate enters."""
    for gate in _gates(structure):
        for part in gate.parts:
            if part.projection.node is node and part.columns == site.columns:
                core, way = gate.attention.core, structure.flow.between(part.projection.output, gate.value)
                result = f"%{gate.product.name} multiplies the result of the attention, %{core.output.name}"
                claim = f"{result}, by %{gate.value.name} before an output projection reads it"
                source = f"%{gate.value.name} leads back {through([*way, gate.value])}to a projection by "
                return [
                    step(claim, core.output, gate.product),
                    step(source + stored(part.projection) + ", with a nonlinearity", node, way, gate.value),
                ]
    return []


def near_misses(structure: Structure, role: str) -> Iterator[NearMiss]:
    """Find attentions whose result is multiplied by something else than a gate, or by nothing."""
    for _, output, product, value in _products(structure):
        frontier = structure.anatomy.frontier(value)
        passed = 2 if not frontier.projections else 3
        if not (frontier.projections and frontier.nonlinear):
            yield NearMiss.at(ROLE, product, CONDITIONS, passed, f"%{value.name} ({ops.name(value)})", value, output)
    for one in structure.attentions:
        for part in one.role("o"):
            way = structure.flow.between(one.core.output, part.projection.node)
            found = ", ".join(dict.fromkeys(ops.name(node) for node in way)) or "nothing"
            yield NearMiss.at(ROLE, part.projection.node, CONDITIONS, 1, found, one.core.output, *way)


def _gates(structure: Structure) -> Iterator[Gate]:
    """Yield the gates of all attentions, in graph order."""
    anatomy = structure.anatomy
    for one, _, product, value in _products(structure):
        frontier = anatomy.frontier(value)
        if not frontier.nonlinear:
            continue
        tags, bases = arrivals(anatomy, value, frontier.projections)
        arrived = split(in_order(tags), frontier.projections, bases)
        parts = [
            ProjectionPart(ROLE, source, columns_of(source, features))
            for source, features in zip(frontier.projections, arrived, strict=True)
            if len(features)
        ]
        if parts:
            yield Gate(one, product, value, tuple(parts))


def _products(structure: Structure) -> Iterator[tuple[Attention, fx.Node, fx.Node, fx.Node]]:
    """Yield each product on the way from an attention's result to its output projection, with its other factor:
    (attention, the projection's input, product, factor)."""
    flow = structure.flow
    for one in structure.attentions:
        for part in one.role("o"):
            end = part.projection.input
            for node in sorted(structure.anatomy.frontier(end).between, key=flow.order.__getitem__):
                sides = [side for side in flow.operands(node) if flow.signal(side)]
                if ops.name(node) == "mul" and len(sides) == 2 and flow.descends(node, one.core.output):
                    own = [flow.descends(side, one.core.output) or side is one.core.output for side in sides]
                    if own[0] != own[1]:
                        yield one, end, node, sides[own.index(False)]
