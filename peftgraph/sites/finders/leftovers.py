"""Projections that belong to no sublayer: routers, heads, low-rank side paths, and the rest."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from torch import fx

from peftgraph.sites.assign.attention import ProjectionPart
from peftgraph.sites.assign.evidence import Step, readers, step, stored
from peftgraph.sites.assign.routers import routes
from peftgraph.sites.assign.structure import Structure
from peftgraph.sites.dataflow import ops
from peftgraph.sites.matchers.projections import Projection
from peftgraph.sites.site import NearMiss, Site

DOWN: Final = "side.down"
UP: Final = "side.up"
ROUTER: Final = ("a projection", "a top-k of its result, or a softmax or sigmoid of it that weighs wider values")
LAST: Final = ("a projection", "no residual add, attention or other projection that reads what follows from it")


def find(structure: Structure) -> None:
    """Find the projections without a role: routers, heads (only the output follows), and the rest."""
    taken = {site.op for site in structure.into.found}
    anatomy, flow = structure.anatomy, structure.flow
    joined = 0
    for node in [*(join.node for join in anatomy.joins), *(core.node for core in anatomy.cores)]:
        joined |= flow.before(node)
    read = 0
    for one in anatomy.projections:
        read |= flow.before(one.node)
    beside = {one: role for path in anatomy.side_paths for one, role in ((path.down, DOWN), (path.up, UP))}
    for one in anatomy.projections:
        if one.node.name in taken:
            continue
        last = not (joined | read) & flow.bit(one.node)
        plain = "router" if one in anatomy.routers else "head" if last else "projection"
        role = beside.get(one, plain)
        structure.into.part(ProjectionPart(role, one, None), None if role == "head" else structure.into.place(one.node))


def evidence(structure: Structure, site: Site, node: fx.Node) -> list[Step]:
    """Say why a projection is a router, a head, part of a side path, or no more than a projection."""
    if site.role in (DOWN, UP):
        return _side_path(structure, node)
    one = structure.anatomy.projection_at[node]
    first = step(f"%{node.name} contracts the signal %{one.input.name} with {stored(one)}: a projection", node)
    if site.role == "head":
        return [first, step("no residual add, attention or other projection reads what follows from it: a head")]
    if site.role == "router":
        choice = routes(structure.anatomy, one)
        assert choice is not None
        what = "chooses" if ops.name(choice) in ops.CHOICE else "weighs"
        way = structure.flow.between(one.output, choice)
        return [first, step(f"its result {what} others at %{choice.name} ({ops.name(choice)}): a router", way, choice)]
    return [first, step("it plays no other role; `sites.unmatched` says what it comes closest to")]


def near_misses(structure: Structure, role: str) -> Iterator[NearMiss]:
    """Find what came closest to a router or a head."""
    if role == "router":
        yield from _weighing(structure)
    elif role == "head":
        yield from _last(structure)


def _side_path(structure: Structure, node: fx.Node) -> list[Step]:
    path = next(path for path in structure.anatomy.side_paths if node in (path.down.node, path.up.node))
    claim = f"%{path.up.node.name} of %{path.down.node.name} is added to %{path.host.node.name}: a low-rank side path"
    return [step(claim, path.down.node, path.up.node, path.host.node)]


def _weighing(structure: Structure) -> Iterator[NearMiss]:
    """Yield projections whose result is squashed, but weights nothing."""
    for one in structure.anatomy.projections:
        for user in one.output.users:
            if ops.name(user) in ops.SOFTMAX or ops.name(user) == "sigmoid":
                yield NearMiss.at("router", one.node, ROUTER, 1, readers(user), user, *list(user.users)[:3])


def _last(structure: Structure) -> Iterator[NearMiss]:
    """Yield the last projection, and what reads it."""
    for one in structure.anatomy.projections[-1:]:
        reader = _follower(structure, one)
        if reader is not None:
            yield NearMiss.at("head", one.node, LAST, 1, f"%{reader.name} ({ops.name(reader)})", one.output, reader)


def _follower(structure: Structure, one: Projection) -> fx.Node | None:
    """Return the first residual add, core or projection after a projection."""
    anatomy, flow = structure.anatomy, structure.flow
    for node in flow.nodes[flow.order[one.output] + 1 :]:
        ends = node in anatomy.join_at or node in anatomy.core_at or node in anatomy.projection_at
        if ends and flow.descends(node, one.output):
            return node
    return None
