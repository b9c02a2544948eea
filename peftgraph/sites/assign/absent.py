"""What attentions lack that others have: a residual add around them, or projections of queries, keys or values."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from peftgraph.sites.assign.attention import Attention
from peftgraph.sites.assign.collection import common, owner
from peftgraph.sites.assign.naming import module_of
from peftgraph.sites.assign.structure import Structure
from peftgraph.sites.dataflow import ops
from peftgraph.sites.site import Absent, Site


def find_absent(structure: Structure) -> Iterator[Absent]:
    """Yield the parts that attentions lack, in order."""
    joined = {one.core for found in structure.blocks.sublayers.values() for one in found}
    for one in structure.attentions:
        for role in "qkv":
            if not one.role(role):
                yield _absent(
                    structure, one, f"attention.{role}", f"no projection makes the {role} of %{one.core.node.name}"
                )
        if not one.role("o"):
            yield _absent(structure, one, "attention.o", f"{_read(one.core.output)}, no projection")
        if one.core not in joined:
            end = one.role("o")[0].projection.output if one.role("o") else one.core.output
            yield _absent(structure, one, "attention", f"%{end.name} enters no residual add, {_read(end)}")


def _absent(structure: Structure, one: Attention, role: str, reason: str) -> Absent:
    paths = [owner(part.weight.parameter, part.weight.experts) for part in one.parts]
    path = common(paths) if paths else module_of(one.core.node)
    place = structure.into.place(one.core.node)
    where = {} if place is None else {"layer": place.layer, "depth": place.depth, "stack": place.stack}
    return Absent(Site(role=role, path=path, op=one.core.node.name, kind=one.kind, **where), reason)


def _read(node: fx.Node) -> str:
    readers = ", ".join(f"%{user.name} ({ops.name(user)})" for user in list(node.users)[:3])
    return f"it is read by {readers}" if readers else "and nothing reads it"
