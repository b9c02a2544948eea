"""Which sites a value is made of, read from the dataflow; and by that, what stands before and after each stack."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import fx

from peftgraph.sites import Site, Sites
from peftgraph.sites.roles import ROLES

# Roles whose outputs are other sites' outputs, or residual sums.
INSIDE = {one.name for one in ROLES if one.level} | {"bias", "ffn.hidden"}


class Near:
    """The nearest sites before a value: `near("add_3")`."""

    def __init__(self, graph: fx.Graph, sites: Sites) -> None:
        self.nodes = {node.name: node for node in graph.nodes}
        self.at: dict[str, list[Site]] = {}
        for site in sites:
            if site.role not in INSIDE and "output" in site.ports:
                self.at.setdefault(site.ports["output"], []).append(site)
            if "join" in site.ports:
                self.at.setdefault(site.ports["join"], []).append(site)

    def __call__(self, name: str | None) -> list[Site]:
        """The sites whose outputs a value is made of with no site between; those that end there, where some do."""
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

    def behind(self, name: str | None) -> Iterable[Site]:
        """The nearest sites, and through those outside of layers the sites behind them, each once."""
        todo, seen = self(name), set[str]()
        while todo:
            site = todo.pop()
            if site.id not in seen:
                seen.add(site.id)
                yield site
                if site.layer is None:
                    todo += self(site.ports.get("input"))


def around(near: Near, sites: Sites, outside: Sequence[Site], stacks: Iterable[str]) -> dict[str, tuple[str, bool]]:
    """Id of a site outside of layers -> the stack on whose stream it stands, and whether before its layers."""
    leads: dict[str, str] = {}
    for name in stacks:
        first = next(site for site in sites if site.role == "block" and (site.stack or "") == name)
        for site in near.behind(first.ports["input"]):
            if site.layer is None:
                leads.setdefault(site.id, name)
    follows: dict[str, str] = {}
    for site in outside:
        for source in near(site.ports.get("input")):
            stack = (source.stack or "") if source.layer is not None else follows.get(source.id)
            if stack is not None:
                follows[site.id] = stack
    return {id: (name, True) for id, name in leads.items()} | {id: (name, False) for id, name in follows.items()}


def reads(near: Near, sites: Sites) -> tuple[tuple[str, str], ...]:
    """(reader, memory) of the stacks, by where the memory of cross-attention comes from."""
    found = {
        (site.stack or "", source.stack or ""): None
        for site in sites
        if "memory" in site.ports
        for source in near.behind(site.ports["memory"])
        if source.layer is not None and source.stack != site.stack
    }
    return tuple(found)
