"""Why a site plays a role in attention: the core, the way to it, the columns that arrive, the kind."""

from __future__ import annotations

from typing import Final

from torch import fx

from peftgraph.sites.assign.attention import Attention, ProjectionPart, find_latents
from peftgraph.sites.assign.evidence import Step, joined, step, stored, through
from peftgraph.sites.assign.structure import Structure
from peftgraph.sites.dataflow import ops
from peftgraph.sites.matchers.anatomy import Anatomy
from peftgraph.sites.matchers.attention_cores import Core
from peftgraph.sites.matchers.projections import Projection
from peftgraph.sites.site import Site

RUNS: Final = {
    "q": ", the factor along whose axis the softmax does not run",
    "k": ", the factor along whose axis the softmax runs",
}


def attention_evidence(structure: Structure, site: Site, node: fx.Node) -> list[Step]:
    if site.role == "attention.core":
        one = next(one for one in structure.attentions if one.core.node is node)
        return [_core(one.core), *(_operand(structure, one, part) for part in one.parts[:3]), _kind(structure, one)]
    latents = find_latents(structure.anatomy, structure.attentions) if site.role == "attention.latent" else []
    one, part = next(
        (one, part)
        for one, part in [*((one, part) for one in structure.attentions for part in one.parts), *latents]
        if part.role == site.role and part.projection.node is node and part.columns == site.columns
    )
    if site.role == "attention.o":
        return [_core(one.core), _reader(structure.anatomy, one.core, part.projection), *_entry(structure, node)]
    if site.role == "attention.latent":
        return [_core(one.core), _latent(one, part)]
    return [_core(one.core), _operand(structure, one, part), _arrival(structure.anatomy, part), _kind(structure, one)]


def _core(core: Core) -> Step:
    if ops.name(core.node) in ops.SDPA:
        return step(f"%{core.node.name} is {ops.name(core.node)}: softmax(q k^T) v in one operator", core.node)
    scores = ", ".join(f"%{one.name}" for one in core.products)
    if core.linear:
        claim = f"%{core.output.name} multiplies a third projection by {scores}, a product of two, without a softmax"
        return step(f"{claim} (linear attention)", core.products, core.output)
    return step(
        f"the argument of the softmax %{core.node.name} leads back to {scores}, a product of two signals (q k^T), "
        f"and its result on to %{core.output.name}, a product with a third (v)",
        core.products,
        core.node,
        core.output,
    )


def _operand(structure: Structure, one: Attention, part: ProjectionPart) -> Step:
    letter = part.role[-1]
    operand = {"q": one.core.q, "k": one.core.k, "v": one.core.v}[letter]
    output = part.projection.output
    way = structure.flow.between(output, operand)
    fused = letter == "v" or one.core.linear or ops.name(one.core.node) in ops.SDPA
    reason = f"{letter} is %{operand.name}" + ("" if fused else RUNS[letter])
    source = f"a projection by {stored(part.projection)}"
    if operand is output:
        return step(f"{reason}, {source}", part.projection.node, output)
    lead = f"{reason}; it leads back {through([*way, operand])}to %{output.name}, {source}"
    return step(lead, part.projection.node, output, way, operand)


def _latent(one: Attention, part: ProjectionPart) -> Step:
    output = part.projection.output
    readers = [p.projection for p in one.parts if p.role != "attention.o" and p.projection is not part.projection]
    shown = ", ".join(f"%{reader.node.name}" for reader in dict.fromkeys(readers))
    return step(
        f"%{output.name}, a projection by {stored(part.projection)}, reaches this attention through further "
        f"projections of it only ({shown}): a latent",
        part.projection.node,
        output,
    )


def _arrival(anatomy: Anatomy, part: ProjectionPart) -> Step:
    width = part.projection.width
    own = f"all {width} of its columns arrive" if part.columns is None else f"columns {part.columns} of {width} arrive"
    heads = f", as {part.heads} heads of {part.head_dim}" if part.heads and part.head_dim else ""
    read = part.projection.input
    value = read if read in anatomy.norm_at or read in anatomy.join_at else anatomy.flow.strip(read)
    what = " (a norm)" if value in anatomy.norm_at else " (a residual add)" if value in anatomy.join_at else ""
    return step(f"{own} there{heads}; the projection reads %{value.name}{what}", value, part.projection.node)


def _kind(structure: Structure, one: Attention) -> Step:
    q, k = one.role("q"), one.role("k")
    reads = [part.projection.input for part in (*q[:1], *k[:1])]
    if len(reads) == 2 and reads[0] is reads[1]:
        return step(f"q and k are projections of one value, %{reads[0].name}: self attention")
    if len(reads) < 2:
        return step(f"{one.kind} attention")
    same = "come from one stream" if one.kind == "self" else "come from different streams"
    return step(f"q (from %{reads[0].name}) and k (from %{reads[1].name}) {same}: {one.kind} attention", reads)


def _reader(anatomy: Anatomy, core: Core, reader: Projection) -> Step:
    way = anatomy.flow.between(core.output, reader.node)
    return step(
        f"%{reader.node.name} is the first projection that reads the result %{core.output.name}, "
        f"{through(way)}and before any residual add",
        core.output,
        way,
        reader.node,
        reader.output,
    )


def _entry(structure: Structure, node: fx.Node) -> list[Step]:
    join = structure.blocks.around(node)
    return [] if join is None else [joined(structure.anatomy, join, node)]
