"""The attention sublayer and its parts: the projections of q, k, v and o, the core, and latents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Final

from torch import fx

from peftgraph.sites.assign.attention import Attention, ProjectionPart, find_latents
from peftgraph.sites.assign.attention_ports import operands_of
from peftgraph.sites.assign.blocks import Place
from peftgraph.sites.assign.collection import common, named, owner
from peftgraph.sites.assign.evidence import Step, readers
from peftgraph.sites.assign.structure import Structure
from peftgraph.sites.dataflow import ops
from peftgraph.sites.dataflow.products import factors, is_product
from peftgraph.sites.finders.attention_evidence import attention_evidence
from peftgraph.sites.finders.sublayers import add_sublayers, sublayer_evidence
from peftgraph.sites.matchers import attention_cores
from peftgraph.sites.site import NearMiss, Site

READER: Final = ("an attention core", "a projection that reads its result, before any residual add")
SUBLAYER: Final = ("a down projection or an attention", "a residual add that its result enters")


def find(structure: Structure) -> None:
    """Add the sites of every attention: its parts, its core and the sublayer."""
    for one in structure.attentions:
        _add(structure, one)
    for one, latent in find_latents(structure.anatomy, structure.attentions):
        structure.into.part(latent, structure.into.place(latent.projection.node), kind=one.kind)
    add_sublayers(structure, "attention")


def evidence(structure: Structure, site: Site, node: fx.Node) -> list[Step]:
    """Say why a site plays its role in attention."""
    how = sublayer_evidence if site.role == "attention" else attention_evidence
    return how(structure, site, node)


def near_misses(structure: Structure, role: str) -> Iterator[NearMiss]:
    """Find what came closest to attention, or to a part of one."""
    if not structure.attentions or role == attention_cores.ROLE:
        yield from _linear_attention(structure)
    elif role == "attention.o":
        yield from _unread(structure)
    elif role == "attention":
        yield from _unjoined(structure)


def _add(structure: Structure, one: Attention) -> None:
    ends = [part.projection.node for part in one.role("o")] or [one.core.output]
    place = structure.into.place(ends[0])
    for part in one.parts:
        if (part.role, part.projection.node, part.columns) not in structure.into.played:
            structure.into.part(part, place if len(ends) == 1 else _among(structure, part, ends), kind=one.kind)
    core, q = one.core, one.role("q")
    if core.linear:
        return  # there is no softmax to put keys beside
    ports, readers_of, axes = operands_of(structure.anatomy, one)
    path = common([owner(part.weight.parameter, part.weight.experts) for part in one.parts])
    heads = q[0].heads if q else None
    reads = structure.into.weights([part.projection.node for part in one.parts])
    more = {"heads": heads, "axis_items": tuple(axes.items()), "reads": reads, "reader_items": named(readers_of)}
    structure.into.add("attention.core", core.node, path, place, ports, kind=one.kind, **more)


def _among(structure: Structure, part: ProjectionPart, ends: Sequence[fx.Node]) -> Place | None:
    """Return the place of a part of attention over several streams: that of the stream the part reads."""
    node = part.projection.node
    if node in ends:
        return structure.into.place(node)
    joins = [join for end in ends if (join := structure.blocks.around(end)) is not None]
    own = [join for join in joins if structure.flow.descends(node, join.source)]
    return structure.blocks.places.get(own[0]) if own else structure.into.place(ends[0])


def _linear_attention(structure: Structure) -> Iterator[NearMiss]:
    """Yield products of products: q (k^T v), or (q k^T) v without a softmax."""
    flow = structure.flow
    for node in flow.nodes:
        if not is_product(flow, node):
            continue
        inner = next((one for one in map(_behind_product(structure), factors(node) or ()) if one is not None), None)
        if inner is not None:
            way = flow.between(inner, node)
            shown = ", ".join(dict.fromkeys(ops.name(one) for one in way)) or "no operator"
            found = f"{shown} between %{inner.name} and %{node.name}, two products of signals (linear attention)"
            miss = NearMiss.at(attention_cores.ROLE, node, attention_cores.CONDITIONS, 0, found, inner, *way)
            yield replace(miss, passed=2)


def _behind_product(structure: Structure):
    flow = structure.flow
    through = ops.LAYOUT | ops.CAST | ops.SCALE | ops.MASKING | ops.DROPOUT

    def find(node: fx.Node) -> fx.Node | None:
        todo, seen = [node], set[fx.Node]()
        while todo:
            here = todo.pop()
            if is_product(flow, here):
                return here
            if here not in seen and ops.name(here) in through and flow.floating(here):
                seen.add(here)
                todo.extend(flow.operands(here))
        return None

    return find


def _unread(structure: Structure) -> Iterator[NearMiss]:
    """Yield cores whose result no projection reads."""
    for one in structure.attentions:
        if not one.role("o"):
            output = one.core.output
            readers = ", ".join(f"%{user.name} ({ops.name(user)})" for user in list(output.users)[:3]) or "no reader"
            yield NearMiss.at("attention.o", output, READER, 1, readers, one.core.node, *list(output.users)[:3])


def _unjoined(structure: Structure) -> Iterator[NearMiss]:
    """Attention that enters no residual add."""
    for one in structure.attentions:
        end = one.role("o")[0].projection.output if one.role("o") else one.core.output
        if not any(structure.flow.descends(join.branch, end) for join in structure.anatomy.joins):
            yield NearMiss.at("attention", end, SUBLAYER, 1, readers(end), one.core.node, *list(end.users)[:3])
