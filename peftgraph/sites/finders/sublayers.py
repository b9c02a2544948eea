"""Sublayers: what the residual stream gets from one attention or one feed-forward."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from peftgraph.sites.assign.blocks import Sublayer
from peftgraph.sites.assign.collection import Ports
from peftgraph.sites.assign.evidence import Step, joined, step
from peftgraph.sites.assign.structure import Structure
from peftgraph.sites.dataflow.tags import varies
from peftgraph.sites.matchers.arrivals import arrivals
from peftgraph.sites.site import Site


def add_sublayers(structure: Structure, role: str) -> None:
    """Add a site for every sublayer of a role, "attention" or "ffn"."""
    blocks = structure.blocks
    for sublayers in blocks.sublayers.values():
        for one in sublayers:
            if one.role == role:
                _add(structure, one, parallel=len(blocks.roles_from[one.join.source]) > 1)


def _add(structure: Structure, one: Sublayer, parallel: bool) -> None:
    join = one.join
    normed = structure.after(join) if join in structure.blocks.post else None
    ports: Ports = {
        "input": one.input,
        "memory": one.memory,
        "residual": join.skip,
        "output": one.output,
        "join": join.node,
        "normed": normed if normed is not join.node else None,
    }
    structure.into.add(
        one.role,
        join.node,
        structure.into.common(one.members, join.node),
        structure.blocks.places.get(join),
        ports,
        kind=one.kind,
        layout=structure.blocks.layout(one),
        parallel=parallel,
        feature_axis=feature_axis(structure, one.members, one.output),
        reads=structure.into.weights(one.members),
    )


def feature_axis(structure: Structure, members: Sequence[fx.Node], value: fx.Node) -> int:
    """Return the axis of a value, from the end, along which the features of the last projection before it are."""
    flow, known = structure.flow, structure.anatomy.projection_at
    before = [known[node] for node in members if node in known and flow.descends(value, known[node].output)]
    if not before:
        return -1
    last = max(before, key=lambda one: flow.order[one.node])
    tags, _ = arrivals(structure.anatomy, value, [last])
    axes = [axis for axis in range(-tags.dim(), 0) if varies(tags, axis)]
    return axes[0] if len(axes) == 1 else -1


def sublayer_evidence(structure: Structure, site: Site, node: fx.Node) -> list[Step]:
    join = structure.anatomy.join_at[node]
    sublayer = next(one for one in structure.blocks.sublayers[join] if one.role == site.role and one.kind == site.kind)
    members = ", ".join(f"%{one.name}" for one in sublayer.members)
    word = "attention" if site.role == "attention" else "feed-forward"
    found = [
        step(f"the branch of %{join.node.name} descends from the {word} of {members}", sublayer.members),
        joined(structure.anatomy, join, sublayer.output),
    ]
    placed = {
        "pre": f"a norm is between %{join.source.name} and the sublayer's input: pre-norm",
        "post": f"a norm follows %{join.node.name} on the stream: post-norm",
        "sandwich": "a norm is on the branch after the sublayer as well: sandwich norm",
    }
    return found if site.layout is None else [*found, step(placed[site.layout])]
