"""Finds the sites that a value is made of in the dataflow, and by that what comes before and after each stack."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import fx

from peftgraph.sites import Site, Sites
from peftgraph.sites.roles import ROLES

# Roles whose outputs are other sites' outputs, or residual sums.
INSIDE = {one.name for one in ROLES if one.level} | {"bias", "ffn.hidden"}


class NearestSites:
    """The nearest sites before each value of a graph."""

    def __init__(self, graph: fx.Graph, sites: Sites) -> None:
        self.nodes = {node.name: node for node in graph.nodes}
        self.at: dict[str, list[Site]] = {}
        for site in sites:
            if site.role not in INSIDE and "output" in site.ports:
                self.at.setdefault(site.ports["output"], []).append(site)
            if "join" in site.ports:
                self.at.setdefault(site.ports["join"], []).append(site)

    def before(self, name: str | None) -> list[Site]:
        """Return the nearest sites whose outputs a value is computed from; none for no value."""
        found: dict[str, list[Site]] = {}
        todo, seen = [] if name is None else [self.nodes[name]], set[fx.Node]()
        while todo:
            node = todo.pop()
            if node in seen:
                continue
            seen.add(node)
            if node.name in self.at:
                found[node.name] = self.at[node.name]
            else:
                todo.extend(node.all_input_nodes)
        return [site for group in found.values() for site in group]

    def upstream(self, name: str | None) -> Iterable[Site]:
        """Yield the nearest sites and, through those outside layers, the sites before them, each once."""
        todo, seen = self.before(name), set[str]()
        while todo:
            site = todo.pop()
            if site.id not in seen:
                seen.add(site.id)
                yield site
                if site.layer is None:
                    todo += self.before(site.ports.get("input"))


def sites_around_stacks(
    nearest: NearestSites, sites: Sites, outside: Sequence[Site], stacks: Iterable[str]
) -> dict[str, tuple[str, bool]]:
    """Return, by the id of a site outside of layers, its stack and whether it comes before the layers.

    Args:
        nearest: of the same graph.
        sites: of the graph.
        outside: the sites that are in no layer.
        stacks: the names of the stacks.
    """
    leads: dict[str, str] = {}
    for name in stacks:
        blocks = (site for site in sites if site.role == "block" and (site.stack or "") == name)
        first = next(blocks, None)
        for site in nearest.upstream(None if first is None else first.ports["input"]):
            if site.layer is None:
                leads.setdefault(site.id, name)
    follows: dict[str, str] = {}
    for site in outside:
        for source in nearest.before(site.ports.get("input")):
            stack = (source.stack or "") if source.layer is not None else follows.get(source.id)
            if stack is not None:
                follows[site.id] = stack
    return {id: (name, True) for id, name in leads.items()} | {id: (name, False) for id, name in follows.items()}


def memory_reads(nearest: NearestSites, sites: Sites) -> tuple[tuple[str, str], ...]:
    """Return (reader, memory) pairs of stacks: the stack of a cross-attention, and the stack that computes its
    memory."""
    found = {
        (site.stack or "", source.stack or ""): None
        for site in sites
        if "memory" in site.ports
        for source in nearest.upstream(site.ports["memory"])
        if source.layer is not None and source.stack != site.stack
    }
    return tuple(found)
