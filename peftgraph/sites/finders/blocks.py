"""Blocks: the layers along a residual stream."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from peftgraph.sites.assign.collection import Ports
from peftgraph.sites.assign.evidence import Step, joined
from peftgraph.sites.assign.structure import Structure
from peftgraph.sites.finders.sublayers import feature_axis
from peftgraph.sites.matchers.residual_adds import near_join
from peftgraph.sites.site import NearMiss, Site


def find(structure: Structure) -> None:
    """Add a site for every layer of every residual stream."""
    blocks, into = structure.blocks, structure.into
    for stream in blocks.streams:
        for start, stop in stream.blocks:
            joins = stream.joins[start:stop]
            ports: Ports = {"input": joins[0].skip, "output": structure.after(joins[-1])}
            members = [n for join in joins for one in blocks.sublayers[join] for n in one.members]
            place, end = blocks.places[joins[0]], joins[-1].node
            path, axis = into.common(members, end), feature_axis(structure, members, end)
            into.add("block", end, path, place, ports, feature_axis=axis, reads=into.weights(members))


def evidence(structure: Structure, site: Site, node: fx.Node) -> list[Step]:
    """Say how the last sublayer of a block enters the residual stream."""
    join = structure.anatomy.join_at[node]
    return [joined(structure.anatomy, join, join.branch)]


def near_misses(structure: Structure, role: str) -> Iterator[NearMiss]:
    """Find the adds that came closest to a residual add."""
    anatomy = structure.anatomy
    found = anatomy.heavy, anatomy.join_at, anatomy.core_at.keys()
    yield from filter(None, (near_join(structure.flow, node, *found) for node in structure.flow.nodes))
