"""Printed names of values, from the sites that own them, and the modules they came from."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

from torch import fx

from peftgraph.sites.roles import ROLES
from peftgraph.sites.site import Site


def titles(sites: Iterable[Site]) -> dict[str, str]:
    """Node name -> printed name: a site's id for its output, `0.attention.q+k+v` for a fused projection."""
    ranks = {one.name: one.title for one in ROLES if one.title is not None}
    owners: dict[str, list[Site]] = defaultdict(list)
    for site in sites:
        if site.role in ranks and "output" in site.ports:
            owners[site.ports["output"]].append(site)
    found: dict[str, str] = {}
    taken: set[str] = set()
    for node, group in owners.items():
        first = min(group, key=lambda site: ranks[site.role])
        same = [site for site in group if site.op == first.op]
        title = first.id + "".join(f"+{site.role.rpartition('.')[2]}" for site in same if site is not first)
        if title not in taken:
            found[node] = title
            taken.add(title)
    return found


def sections(sites: Iterable[Site]) -> dict[str, str]:
    """Node name -> prefix of the values from there on: the block it is in, or the part around the blocks."""
    found: dict[str, str] = {}
    for site in sites:
        if site.layer is not None:
            prefix = ".".join(part for part in (site.stack, str(site.layer)) if part)
            for port in ("input", "output"):
                if port in site.ports and (port == "output" or site.role == "norm"):
                    found.setdefault(site.ports[port], prefix)
        elif site.role in ("head", "embedding") and "output" in site.ports:
            found.setdefault(site.ports["output"], site.id)
    return found


def module_of(node: fx.Node) -> str:
    """Return the innermost module a node came from, as far as the trace recorded it."""
    stack: Mapping[str, tuple[str, object]] = node.meta.get("nn_module_stack") or {}
    names = [str(value[0]) for value in stack.values()]
    return names[-1].removeprefix("L['self'].") if names else ""
