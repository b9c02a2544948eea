"""The feed-forward sublayer and its parts: up, gate, down and the hidden value."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from torch import fx

from peftgraph.sites.assign import feedforward
from peftgraph.sites.assign.attention import ProjectionPart
from peftgraph.sites.assign.collection import owner
from peftgraph.sites.assign.evidence import Step, joined, readers, step, stored, through
from peftgraph.sites.assign.feedforward import FeedForward
from peftgraph.sites.assign.structure import Structure
from peftgraph.sites.dataflow import ops
from peftgraph.sites.finders.sublayers import add_sublayers, sublayer_evidence
from peftgraph.sites.matchers.projections import Projection
from peftgraph.sites.matchers.residual_adds import Join
from peftgraph.sites.site import NearMiss, Site

GATE: Final = ("a down projection", "a multiplication of two values of different columns behind it")


def find(structure: Structure) -> None:
    """Add the sites of every feed-forward: its parts, its hidden values and the sublayer."""
    for one in structure.feedforwards:
        _add(structure, one)
    add_sublayers(structure, "ffn")


def evidence(structure: Structure, site: Site, node: fx.Node) -> list[Step]:
    """Say why a site plays its role in a feed-forward."""
    if site.role == "ffn":
        return sublayer_evidence(structure, site, node)
    one = next(one for one in structure.feedforwards if _owns(one, site, node))
    down = _down(structure, one, node)
    frontier = structure.anatomy.frontier(down.input)
    flow = structure.flow
    between = sorted(frontier.between, key=flow.order.__getitem__)
    bent = [n for n in between if ops.name(n) in ops.NONLINEAR]
    sources = ", ".join(f"%{source.output.name}" for source in frontier.projections)
    shown = ", ".join(f"%{n.name} ({ops.name(n)})" for n in bent)
    found = [
        step(
            f"%{down.node.name} is a projection by {stored(down)} whose result {_way_out(structure, one, down)}",
            down.node,
        ),
        joined(structure.anatomy, one.join, down.node),
        step(
            f"its input leads back {through(between)}to projections only, {sources}, with a nonlinearity: {shown}",
            [source.node for source in frontier.projections],
            between,
        ),
    ]
    if site.role in ("ffn.up", "ffn.gate"):
        found.append(_side(one, site, node))
    if site.role == "ffn.hidden":
        found.append(step(f"%{down.input.name} is what the down projection reads: the hidden value", down.input))
    return found


def near_misses(structure: Structure, role: str) -> Iterator[NearMiss]:
    """Find what came closest to a feed-forward, or to a gate in one."""
    gates = role == "ffn.gate" and bool(structure.feedforwards)
    return _ungated(structure) if gates else _branchless(structure)


def _add(structure: Structure, one: FeedForward) -> None:
    place = structure.blocks.places.get(one.join)
    experts = _experts(structure, one)
    for part in one.parts:
        structure.into.part(part, place, **experts.get(part.projection, {}))
    for down in one.downs:
        weight = ProjectionPart("ffn.hidden", down, None).weight
        structure.into.add(
            "ffn.hidden",
            down.node,
            owner(weight.parameter, weight.experts),
            place,
            {"input": down.input, "output": down.input, "offsets": down.offsets, "chosen": down.chosen},
            weight=weight,
            feature_axis=down.input_axis,
            equation=down.equation,
            form=down.form,
            shape=weight.shape(structure.flow.tensors),
            **{"expert": down.expert, **experts.get(down, {})},
        )


def _experts(structure: Structure, one: FeedForward) -> dict[Projection, dict[str, object]]:
    """Several downs of one shape on one join, weighed by a router, are experts by number."""
    routed = _routed(structure, one.join)
    alike = [down for down in one.downs if down.weight.experts is None and down.width == one.downs[0].width]
    shapes = [down.weight.shape(structure.flow.tensors) for down in alike]
    numbered_downs = [d for d, shape in zip(alike, shapes, strict=True) if shapes.count(shape) > 1]
    if not routed or len(numbered_downs) < 2:
        return {}
    numbers: dict[Projection, dict[str, object]] = {}
    for number, down in enumerate(numbered_downs):
        for member in (down, *structure.anatomy.frontier(down.input).projections):
            numbers[member] = {"expert": number}
    return numbers


def _routed(structure: Structure, join: Join) -> bool:
    return any(
        structure.flow.descends(join.branch, router.node) and structure.flow.descends(router.node, join.source)
        for router in structure.anatomy.routers
    )


def _way_out(structure: Structure, one: FeedForward, down: Projection) -> str:
    last = structure.anatomy.frontier(one.join.branch).projections
    by = ", ".join(f"%{other.node.name}" for other in last if structure.flow.descends(other.node, down.output))
    return "enters a residual add" if down in last else f"is carried on to a residual add by {by}"


def _owns(one: FeedForward, site: Site, node: fx.Node) -> bool:
    if site.role == "ffn.hidden":
        return any(down.node is node for down in one.downs)
    return any(p.role == site.role and p.projection.node is node and p.columns == site.columns for p in one.parts)


def _down(structure: Structure, one: FeedForward, node: fx.Node) -> Projection:
    """Return the down projection to which a part belongs."""
    own = [down for down in one.downs if down.node is node]
    reading = [
        down
        for down in one.downs
        if any(source.node is node for source in structure.anatomy.frontier(down.input).projections)
    ]
    return (own or reading or list(one.downs))[0]


def _side(one: FeedForward, site: Site, node: fx.Node) -> Step:
    part = next(p for p in one.parts if p.role == site.role and p.projection.node is node and p.columns == site.columns)
    width = part.projection.width
    own = f"all {width} columns" if part.columns is None else f"columns {part.columns} of {width}"
    if any(p.role == "ffn.gate" for p in one.parts):
        bent = "is nonlinear: gate" if site.role == "ffn.gate" else "carries the value: up"
        note = f" ({part.note})" if part.note else ""
        return step(f"its two sides of a multiplication carry different columns; the one of {own} {bent}{note}")
    return step(f"{own} arrive, and no multiplication gates them: up")


def _ungated(structure: Structure) -> Iterator[NearMiss]:
    for one in structure.feedforwards:
        for down in one.downs:
            between = sorted(structure.anatomy.frontier(down.input).between, key=structure.flow.order.__getitem__)
            shown = ", ".join(dict.fromkeys(ops.name(node) for node in between)) or "nothing"
            yield NearMiss.at("ffn.gate", down.node, GATE, 1, shown, *between)


def _branchless(structure: Structure) -> Iterator[NearMiss]:
    """Yield two projections and a nonlinearity whose result enters no residual add."""
    for one in structure.anatomy.projections:
        frontier = structure.anatomy.frontier(one.input)
        joined = any(structure.flow.descends(join.branch, one.output) for join in structure.anatomy.joins)
        if not joined and frontier.projections and frontier.nonlinear and not frontier.stops:
            between = sorted(frontier.between, key=structure.flow.order.__getitem__)
            sources = [source.node for source in frontier.projections]
            near = [*sources, *between, *list(one.output.users)[:3]]
            miss = NearMiss.at("ffn.down", one.node, feedforward.CONDITIONS, 0, readers(one.output), *near)
            yield replace(miss, passed=3)
