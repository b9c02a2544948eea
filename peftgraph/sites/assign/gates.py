"""Up and gate: the two sides of the multiplication whose sides carry different features."""

from __future__ import annotations

import torch
from torch import fx

from peftgraph.sites.assign.attention import ProjectionPart
from peftgraph.sites.dataflow import ops
from peftgraph.sites.dataflow.tags import in_order
from peftgraph.sites.matchers.anatomy import Anatomy
from peftgraph.sites.matchers.arrivals import arrivals, columns_of, split
from peftgraph.sites.matchers.projections import Projection

Side = tuple[str, torch.Tensor, list[int], str]  # of a gating product: role, tags, bases, note


def ups(anatomy: Anatomy, down: Projection) -> list[ProjectionPart]:
    """Return the parts up and gate of a feed-forward, or up alone where nothing gates it."""
    sources = sources_of(anatomy, down)
    gated = gating(anatomy, down, sources)
    if gated is None:
        tags, bases = arrivals(anatomy, down.input, sources)
        arrived = split(in_order(tags), sources, bases)
        return [
            ProjectionPart("ffn.up", source, columns_of(source, features))
            for source, features in zip(sources, arrived, strict=True)
            if len(features)
        ]
    parts: list[ProjectionPart] = []
    for role, tags, bases, note in gated[1]:
        for source, features in zip(sources, split(tags, sources, bases), strict=True):
            if len(features):
                parts.append(ProjectionPart(role, source, columns_of(source, features), note=note))
    return sorted(parts, key=lambda part: anatomy.flow.order[part.projection.node])


def sources_of(anatomy: Anatomy, down: Projection) -> list[Projection]:
    """Return the nearest projections behind a projection, without those that only choose."""
    return [one for one in anatomy.frontier(down.input).projections if one not in anatomy.routers]


def gating(anatomy: Anatomy, down: Projection, sources: list[Projection]) -> tuple[fx.Node, list[Side]] | None:
    """Return the last multiplication before `down` with disjoint features on its sides, and these sides."""
    between = anatomy.frontier(down.input).between
    for node in sorted(between, key=lambda one: -anatomy.flow.order[one]):
        if ops.name(node) == "glu":
            return node, _fused_gate(anatomy, node, sources)
        operands = [one for one in anatomy.flow.operands(node) if anatomy.flow.signal(one)]
        if ops.name(node) != "mul" or len(operands) != 2:
            continue
        tagged = [arrivals(anatomy, operand, sources) for operand in operands]
        features = [in_order(tags) for tags, _ in tagged]
        if not all(map(len, features)) or torch.equal(*features) or bool(torch.isin(*features).any()):
            continue
        bent = [_bent(anatomy, operand) for operand in operands]
        gate = 0 if bent[0] else 1
        note = "" if bent[0] != bent[1] else "both sides are nonlinear" if bent[0] else "neither side is nonlinear"
        return node, [
            ("ffn.gate", features[gate], tagged[gate][1], note),
            ("ffn.up", features[1 - gate], tagged[1 - gate][1], note),
        ]
    return None


def _bent(anatomy: Anatomy, node: fx.Node) -> bool:
    return anatomy.frontier(node).nonlinear


def _fused_gate(anatomy: Anatomy, node: fx.Node, sources: list[Projection]) -> list[Side]:
    """Recognise glu(x) = x[:n] * sigmoid(x[n:])."""
    axis = ops.argument(node, 1, "dim")
    tags, bases = arrivals(anatomy, anatomy.flow.operands(node)[0], sources)
    up, gate = tags.chunk(2, dim=axis if isinstance(axis, int) else -1)
    return [("ffn.up", in_order(up), bases, ""), ("ffn.gate", in_order(gate), bases, "")]
