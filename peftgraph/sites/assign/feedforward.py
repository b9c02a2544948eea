"""Feed-forward roles: up, gate and down around a nonlinearity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from torch import fx

from peftgraph.sites.assign.attention import ProjectionPart
from peftgraph.sites.assign.gates import sources_of, ups
from peftgraph.sites.assign.position_wise import mixed
from peftgraph.sites.dataflow import ops
from peftgraph.sites.matchers.anatomy import Anatomy
from peftgraph.sites.matchers.projections import Projection
from peftgraph.sites.matchers.residual_adds import Join
from peftgraph.sites.site import NearMiss

ROLE: Final = "ffn.down"
CONDITIONS: Final = (
    "a projection whose result enters a residual add",
    "projections alone behind its input, none of them of attention",
    "a nonlinearity between it and the projection before it",
    "a result of its own for each position, from that position alone",
)


@dataclass(frozen=True, eq=False)
class FeedForward:
    """The feed-forward on one join: all its parts, and the values that enter its downs."""

    join: Join
    parts: tuple[ProjectionPart, ...]
    downs: tuple[Projection, ...]


def find_feedforward(
    anatomy: Anatomy, join: Join, taken: set[Projection], attended: set[fx.Node]
) -> tuple[FeedForward | None, list[NearMiss]]:
    """Return the feed-forward whose result enters `join`; `attended`: the roots of streams that carry attention."""
    downs: list[Projection] = []
    misses: list[NearMiss] = []
    for candidate in anatomy.frontier(join.branch).projections:
        if candidate in taken or candidate in anatomy.routers:
            continue
        miss = _unfit(anatomy, join, candidate, join.node, taken, attended)
        if miss is None:
            downs.append(candidate)
            continue
        carried = [
            one
            for one in _carried(anatomy, candidate)
            if one not in taken and _unfit(anatomy, join, one, candidate.input, taken, attended) is None
        ]
        downs += carried
        misses += [] if carried else [miss]
    parts = [part for down in downs for part in (*ups(anatomy, down), ProjectionPart(ROLE, down, None))]
    return (FeedForward(join, tuple(parts), tuple(downs)) if downs else None), misses


def _carried(anatomy: Anatomy, candidate: Projection) -> list[Projection]:
    """Return the projections whose results another one carries on to the stream as they are: out of the narrower space
    of the experts, or out of a block that several layers share."""
    behind = sources_of(anatomy, candidate)
    return [] if anatomy.frontier(candidate.input).stops or _bent(anatomy, candidate, behind) else behind


def _bent(anatomy: Anatomy, candidate: Projection, behind: list[Projection]) -> bool:
    """Tell whether a nonlinearity is between a projection and those after it; one that only weights their results does
    not count."""
    bends = anatomy.frontier(candidate.input).bends
    return any(anatomy.flow.descends(node, one.output) for node in bends for one in behind)


def _unfit(
    anatomy: Anatomy, join: Join, candidate: Projection, goal: fx.Node, taken: set[Projection], attended: set[fx.Node]
) -> NearMiss | None:
    """Why a projection is no down projection; None where it is one. `goal`: the value that its result becomes."""

    def miss(passed: int, found: str, *near: fx.Node) -> NearMiss:
        return NearMiss.at(ROLE, candidate.node, CONDITIONS, passed, found, *near)

    frontier, behind = anatomy.frontier(candidate.input), sources_of(anatomy, candidate)
    if frontier.stops:
        stop = frontier.stops[0]
        return miss(1, f"%{stop.name} ({ops.name(stop)})", stop, join.node)
    if not behind:
        return miss(1, "no projection", candidate.input, join.node)
    attends = next((one.output for one in behind if one in taken), None)
    if attends is not None:
        return miss(1, f"%{attends.name}, which belongs to attention", attends)
    if not _bent(anatomy, candidate, behind):
        between = sorted(frontier.between, key=anatomy.flow.order.__getitem__)
        found = ", ".join(dict.fromkeys(ops.name(one) for one in between)) or "nothing"
        return miss(2, found, *(one.output for one in behind), *between, join.node)
    found = mixed(anatomy, join, candidate, goal, attended)
    return found and miss(3, *found, join.node)
