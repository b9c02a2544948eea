"""Attention roles: which features of which projections become q, k and v of a core, and which projection
reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from peftgraph.sites.dataflow import ops
from peftgraph.sites.dataflow.tags import in_order, squeeze_constant, varies
from peftgraph.sites.matchers.anatomy import Anatomy
from peftgraph.sites.matchers.arrivals import arrivals, by_row, columns_of, split
from peftgraph.sites.matchers.attention_cores import CONDITIONS, Core
from peftgraph.sites.matchers.projections import Projection
from peftgraph.sites.site import Bias, Columns, NearMiss, Weight


@dataclass(frozen=True, eq=False)
class ProjectionPart:
    """Features of a projection that play one role; `columns` None means all, in order."""

    role: str
    projection: Projection
    columns: Columns | None
    heads: int | None = None
    head_dim: int | None = None
    note: str = ""

    @property
    def weight(self) -> Weight:
        stored = self.projection.weight
        return replace(stored, window=window_of(stored.window, self.columns))

    @property
    def bias(self) -> Bias | None:
        bias = self.projection.bias
        return None if bias is None else Bias(bias.parameter, window_of(bias.window, self.columns))


@dataclass(frozen=True, eq=False)
class Attention:
    core: Core
    parts: tuple[ProjectionPart, ...]
    kind: str

    def role(self, role: str) -> tuple[ProjectionPart, ...]:
        return tuple(part for part in self.parts if part.role == f"attention.{role}")


def window_of(window: Columns | None, columns: Columns | None) -> Columns | None:
    """Return the window of a window."""
    if window is None or columns is None:
        return columns if window is None else window
    return Columns.from_indices(window.index()[columns.index()])


def find_attention(anatomy: Anatomy) -> tuple[list[Attention], list[NearMiss]]:
    """Return the attention of every core; and where a core's operand leads to no projection, the reason."""
    found: list[tuple[Core, list[ProjectionPart]]] = []
    misses: list[NearMiss] = []
    inputs: set[Projection] = set()
    for core in anatomy.cores:
        parts: list[ProjectionPart] = []
        for role, operand, axes in zip("qkv", (core.q, core.k, core.v), core.features, strict=True):
            played = _parts(anatomy, f"attention.{role}", operand, axes)
            if not played:
                misses.append(_operand_miss(anatomy, role, core, operand))
            parts += played
        inputs.update(part.projection for part in parts)
        found.append((core, parts))
    outputs = _outputs(anatomy, inputs)
    return [_attention(anatomy, core, parts, outputs) for core, parts in found], misses


def _attention(
    anatomy: Anatomy, core: Core, parts: list[ProjectionPart], outputs: dict[fx.Node, list[Projection]]
) -> Attention:
    last = [ProjectionPart("attention.o", reader, None) for reader in outputs.get(core.output, [])]
    return Attention(core, (*parts, *last), _kind(anatomy, core, parts))


def attended(anatomy: Anatomy, found: Sequence[Attention]) -> set[fx.Node]:
    """Return the roots of the streams that carry attention."""
    ends = {part.projection.node for one in found for part in one.role("o")} | {one.core.output for one in found}
    roots: set[fx.Node] = set()
    for join in anatomy.joins:
        frontier = anatomy.frontier(join.branch)
        if not ends.isdisjoint({one.node for one in frontier.projections}) or not ends.isdisjoint(frontier.stops):
            roots.add(join.root)
    return roots


def _parts(anatomy: Anatomy, role: str, operand: fx.Node, axes: Sequence[int]) -> list[ProjectionPart]:
    """Return the features that make an operand; `axes`: those of the operand that hold the features of a head."""
    sources = anatomy.frontier(operand).projections
    if not sources:
        return []
    tags, bases = arrivals(anatomy, operand, sources)
    if not any(varies(tags, axis) for axis in axes if tags.shape[axis] > 1):
        axes = (-1,)  # attention over channels: what is multiplied are positions
        tags = squeeze_constant(tags)
    tags = by_row(tags, axes)
    kept = _by_head(tags)
    if kept.dim() and bool((kept.diff(dim=-1) == 0).any()):
        kept = _completed(kept, tags, by_row(arrivals(anatomy, operand, sources, last=True)[0], axes))
    arrived = split(in_order(kept), sources, bases)
    parts: list[ProjectionPart] = []
    for source, base, features in zip(sources, bases, arrived, strict=True):
        if len(features):
            heads = _heads(torch.where((base < tags) & (tags <= base + source.width), tags, 0), len(features))
            width = len(features) // heads if heads else None
            parts.append(ProjectionPart(role, source, columns_of(source, features), heads, width))
    return parts


def _heads(tags: torch.Tensor, features: int) -> int | None:
    """Return the number of heads: rows that carry features of their own, as many each. None where rows share some."""
    if tags.dim() == 0:
        return None
    for axis in range(tags.dim() - 2, -1, -1):
        if not varies(tags, axis):
            tags = tags.select(axis, 0)
    rows = torch.unique(tags.reshape(-1, tags.shape[-1]), dim=0)
    rows = rows[(rows != 0).any(dim=-1)]
    distinct = [torch.unique(row[row != 0]) for row in rows]
    apart = len(torch.unique(torch.cat(distinct))) == sum(map(len, distinct))
    alike = len({len(row) for row in distinct}) == 1 and features % len(distinct) == 0
    return len(distinct) if apart and alike else None


def _by_head(tags: torch.Tensor) -> torch.Tensor:
    """Return the heads in the order of the operand, the features of each in the order of the weight.

    Rotary embedding hands features on in pairs of another order, which says nothing about the projection.
    """
    kept = squeeze_constant(tags)
    return kept if kept.dim() == 0 else kept.sort(dim=-1).values


def _completed(kept: torch.Tensor, tags: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Return heads with their overwritten features restored: rotary embedding may compute both members of a pair from
    both, in the same order, so that one tag arrives twice. `others`: the tags when the last operand's win."""
    for axis in range(tags.dim() - 1, -1, -1):
        if not varies(tags, axis):
            others = others.select(axis, 0)
    both = torch.cat((kept, others), dim=-1).sort(dim=-1).values
    new = torch.ones_like(both, dtype=torch.bool)
    new[..., 1:] = both.diff(dim=-1) != 0
    whole = bool((new.sum(-1) == kept.shape[-1]).all()) and bool((both > 0).all())
    return both[new].reshape(kept.shape) if whole else kept


def _operand_miss(anatomy: Anatomy, role: str, core: Core, operand: fx.Node) -> NearMiss:
    flow, stops = anatomy.flow, anatomy.frontier(operand).stops[:3]
    if not stops:
        behind = flow.members(flow.before(operand) | flow.bit(operand))
        stops = tuple(one for one in behind if one.op == "get_attr" and flow.floating(one))[:3]
    shown = ", ".join(f"%{stop.name}" for stop in stops) or "constants only"
    found = f"{shown} behind {role}, %{operand.name}"
    return NearMiss.at(f"attention.{role}", core.node, CONDITIONS, 4, found, operand, *stops)


def _outputs(anatomy: Anatomy, inputs: set[Projection]) -> dict[fx.Node, list[Projection]]:
    """Return, for each core's output, the first projection that reads it before any join, and those that read other
    positions of it (jointly attended streams are split again)."""
    readers: dict[fx.Node, list[Projection]] = {}
    for candidate in anatomy.projections:
        if candidate not in inputs:
            for stop in anatomy.frontier(candidate.input).stops:
                known = readers.setdefault(stop, []) if stop in anatomy.core_at else None
                if known is not None and (not known or _reads_apart(anatomy, candidate, known[0])):
                    known.append(candidate)
    return readers


def _reads_apart(anatomy: Anatomy, one: Projection, other: Projection) -> bool:
    """Do two readers of one value each cut their own piece out of it?"""
    mine, others = (anatomy.frontier(reader.input).between | {reader.input} for reader in (one, other))
    return all(any(ops.name(node) in ops.CUT for node in cut) for cut in (mine - others, others - mine))


def _kind(anatomy: Anatomy, core: Core, parts: Sequence[ProjectionPart]) -> str:
    """Return the kind: "self" if q and k come from the same place on the same stream; "linear" in any case without a
    softmax."""
    if core.linear:
        return "linear"
    q = [part.projection.input for part in parts if part.role == "attention.q"] or [core.q]
    k = [part.projection.input for part in parts if part.role == "attention.k"] or [core.k]
    if set(q) & set(k):
        return "self"
    return "self" if origins(anatomy, q) & origins(anatomy, k) else "cross"


def origins(anatomy: Anatomy, nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """Return where the values come from, before any projections: roots of the streams, or other nodes at which the walk
    back stops. It continues before convolutions and pooling (keys of a coarser grid); there, an input without a stream
    of its own is ignored (two towers may read one image)."""
    roots = {join.root for join in anatomy.joins}
    found: set[fx.Node] = set()
    todo, seen = [(node, False) for node in nodes], set[fx.Node]()
    while todo:
        node, coarse = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        frontier = anatomy.frontier(node)
        found |= {one.output for one in frontier.projections if one.output in roots}
        todo += [(one.input, coarse) for one in frontier.projections if one.output not in roots]
        coarse = coarse or any(anatomy.flow.channelwise(one) for one in frontier.between)
        for stop in frontier.stops:
            if stop in anatomy.join_at:
                found.add(anatomy.join_at[stop].root)
            elif stop in roots or not (stop.op == "placeholder" and coarse):
                found.add(stop)
                if ops.name(stop) in ops.CONV | ops.POOLING:
                    todo.append((anatomy.flow.operands(stop)[0], True))
    return found


def find_latents(anatomy: Anatomy, attentions: Sequence[Attention]) -> list[tuple[Attention, ProjectionPart]]:
    """Return projections whose features reach q, k or v of one attention through further projections only.

    Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1) compresses its keys and values so. The
    start of a residual stream, or a value that several attentions read, is no latent.
    """
    readers: dict[Projection, dict[Attention, list[fx.Node]]] = {}
    for one in attentions:
        for value in {part.projection.input for part in one.parts if part.role != "attention.o"}:
            frontier = anatomy.frontier(value)
            for latent in () if frontier.nonlinear or frontier.stops else frontier.projections:
                readers.setdefault(latent, {}).setdefault(one, []).append(value)
    found: list[tuple[Attention, ProjectionPart]] = []
    for latent, reading in readers.items():
        one, values = next(iter(reading.items()))
        if len(reading) == 1 and not _before_stream(anatomy, latent, one):
            arrived = [in_order(arrivals(anatomy, value, [latent])[0]) for value in values]
            features = torch.unique(torch.cat(arrived)) - 1
            found.append((one, ProjectionPart("attention.latent", latent, columns_of(latent, features))))
    return found


def _before_stream(anatomy: Anatomy, latent: Projection, one: Attention) -> bool:
    """Tell whether the residual stream that an attention writes to starts from the projection."""
    flow = anatomy.flow
    join = next((join for join in anatomy.joins if flow.descends(join.branch, one.core.output)), None)
    return join is not None and flow.descends(join.source, latent.output)
