"""What came closest to a role that no site has."""

from __future__ import annotations

from torch import fx

from peftgraph.sites.assign.structure import Structure
from peftgraph.sites.dataflow import ops
from peftgraph.sites.search import finder_of
from peftgraph.sites.site import NearMiss


def near_misses(structure: Structure, role: str) -> list[NearMiss]:
    """Return what came closest to a role, best first; empty where nothing like it is in the graph."""
    found = [*_recorded(structure, role), *finder_of(role).near_misses(structure, role)]
    return sorted(found, key=lambda miss: -miss.passed / miss.total)


def _recorded(structure: Structure, role: str) -> list[NearMiss]:
    if not role.startswith("attention"):
        return [miss for miss in structure.misses if miss.role.startswith(role.partition(".")[0])]
    own = [miss for miss in structure.misses if miss.role == role]
    return own or [m for m in structure.misses if m.role.startswith("attention") and not structure.attentions]


def mixing(structure: Structure) -> list[fx.Node]:
    """Return the operations that bring positions together in a net without attention."""
    return [
        node for node in structure.flow.nodes if node in structure.anatomy.convolutions or ops.name(node) in ops.POOLING
    ]
