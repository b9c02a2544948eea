"""Projections without a role: the closest role of each, and why it does not apply."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

from torch import fx

from peftgraph.sites.assign.structure import Structure
from peftgraph.sites.dataflow import ops
from peftgraph.sites.found import FoundSites
from peftgraph.sites.matchers.projections import Projection
from peftgraph.sites.site import Site


@dataclass(frozen=True)
class Loose:
    """A projection without a role.

    Attributes:
        site: its site, of role "projection".
        closest: the closest role; "" if there is none.
        reason: why it does not have that role, with printed names.
    """

    site: Site
    closest: str
    reason: str


@dataclass(frozen=True)
class Unmatched(Sequence[Loose]):
    """The projections without a role, in graph order; prints as a table."""

    items: tuple[Loose, ...]

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, index: int) -> Loose: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Loose, ...]: ...
    def __getitem__(self, index: int | slice) -> Loose | tuple[Loose, ...]:
        return self.items[index]

    def __str__(self) -> str:
        if not self.items:
            return "Every projection belongs to a site."
        rows = [("projection", "path", "shape", "closest", "why not")]
        for one in self.items:
            shape = " x ".join(map(str, one.site.shape or ()))
            rows.append((one.site.id, one.site.path, shape, one.closest or "-", one.reason))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        return "\n".join(line.rstrip() for line in lines)


def unmatched(sites: FoundSites) -> Unmatched:
    """Return the projections of some sites that play no role, with reasons where the graph is at hand."""
    loose = [site for site in sites if site.role == "projection"]
    if sites.origin is None:
        return Unmatched(tuple(Loose(site, "", "") for site in loose))
    say, structure = sites.origin.say, sites.origin.structure
    found: list[Loose] = []
    for site in loose:
        closest, reason = _closest(structure, structure.anatomy.projection_at[sites.origin.nodes[site.op]])
        found.append(Loose(site, closest, say(reason)))
    return Unmatched(tuple(found))


def _closest(structure: Structure, one: Projection) -> tuple[str, str]:
    """Return (role, why not): the searches' record of a projection; otherwise what its result reaches."""
    recorded = next((miss for miss in structure.misses if miss.node == one.node.name), None)
    if recorded is not None:
        return recorded.role, recorded.reason
    ends = _ends(structure, one)
    cores = {node: core for core in structure.anatomy.cores for node in (core.output, *core.products)}
    for end in ends:
        if end in cores:
            return (
                "attention",
                f"its result reaches the attention %{cores[end].node.name}, but none of its columns arrive in order",
            )
    for end in ends:
        if end in structure.anatomy.projection_at:
            reader = structure.anatomy.projection_at[end]
            return "ffn.up", f"%{reader.node.name} reads its result, but is no down projection of a feed-forward"
    for end in ends:
        if end in structure.anatomy.products:
            return "attention", f"its result enters the product %{end.name}, which belongs to no attention"
        if ops.name(end) in ops.CONV | ops.POOLING:
            return "", f"its result enters %{end.name} ({ops.name(end)})"
        if end in structure.anatomy.join_at:
            return "ffn.down", f"its result reaches %{end.name}, but not as the branch of that residual add"
    return "", "its result reaches no residual add, attention or projection"


def _ends(structure: Structure, one: Projection) -> list[fx.Node]:
    """Return what the result runs into first, on every way forward, in graph order."""
    anatomy = structure.anatomy
    ends: set[fx.Node] = set()
    todo, seen = [one.output], set[fx.Node]()
    while todo:
        for user in todo.pop().users:
            stops = anatomy.stops_at(user) or user in anatomy.projection_at or user.op == "output"
            if stops:
                ends.add(user)
            elif user not in seen:
                todo.append(user)
            seen.add(user)
    return sorted(ends - {one.node}, key=lambda node: structure.flow.order[node])
