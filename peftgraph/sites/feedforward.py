"""Feed-forward roles: up, gate and down around a nonlinearity; and routers, which are none of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import fx

from . import ops
from .anatomy import Anatomy
from .attention import Part, arrivals, columns_of, split
from .joins import Join
from .projections import Projection
from .site import NearMiss
from .tags import Tagger, along, in_order, varies

Side = tuple[str, torch.Tensor, list[int], str]  # of a gating product: role, tags, bases, note
CONDITIONS: Final = (
    "a projection whose result enters a residual add",
    "projections alone behind its input, none of them of attention",
    "a nonlinearity between it and the projection before it",
    "a result of its own for each position, from that position alone",
)
REACH = 40  # how many nodes a router's scores may pass before they choose


@dataclass(frozen=True, eq=False)
class FeedForward:
    """The feed-forward on one join: all its parts, and the values that enter its downs."""

    join: Join
    parts: tuple[Part, ...]
    downs: tuple[Projection, ...]


def find_routers(anatomy: Anatomy, taken: set[Projection]) -> set[Projection]:
    """Projections whose result chooses or weighs others: it reaches a top-k, or scales a wider value."""
    return {one for one in anatomy.projections if one not in taken and routes(anatomy, one)}


def routes(anatomy: Anatomy, candidate: Projection) -> fx.Node | None:
    """Where the result chooses or weighs others; None where it does neither."""
    through = ops.LAYOUT | ops.CAST | ops.NONLINEAR | ops.SCALE | ops.MASKING | ops.DROPOUT | ops.REDUCTION
    todo, seen = [(candidate.output, False)], set[fx.Node]()
    while todo and len(seen) < REACH:
        here, weighs = todo.pop(0)
        for user in here.users:
            kind = ops.name(user)
            if kind in ops.CHOICE:
                return user if any(anatomy.flow.descends(join.node, user) for join in anatomy.joins) else None
            if weighs and kind == "mul" and _widens(anatomy, here, user):
                return user
            if user not in seen and kind in through and user not in anatomy.join_at:
                seen.add(user)
                squashed = kind in ops.SOFTMAX or (kind == "sigmoid" and candidate.width == 1)
                todo.append((user, weighs or squashed))
    return None


def _widens(anatomy: Anatomy, weight: fx.Node, product: fx.Node) -> bool:
    narrow, wide = anatomy.flow.shape(weight), anatomy.flow.shape(product)
    return bool(narrow) and narrow[-1] == 1 and wide[-1] > 1


def find_feedforward(
    anatomy: Anatomy, join: Join, taken: set[Projection], attended: set[fx.Node]
) -> tuple[FeedForward | None, list[NearMiss]]:
    """The feed-forward whose result enters `join`; `attended`: the roots of streams that carry attention."""
    parts: list[Part] = []
    downs: list[Projection] = []
    misses: list[NearMiss] = []
    for candidate in anatomy.frontier(join.branch).projections:
        if candidate in taken or candidate in anatomy.routers:
            continue
        miss = _unfit(anatomy, join, candidate, taken)
        if miss is None and join.root not in attended and _local(anatomy, candidate):
            found = "a depthwise convolution inside it, and no attention on its stream"
            miss = NearMiss.at("ffn.down", candidate.node, CONDITIONS, 3, found, candidate.input, join.node)
        if miss is not None:
            misses.append(miss)
            continue
        downs.append(candidate)
        parts += [*_ups(anatomy, candidate), Part("ffn.down", candidate, None)]
    return (FeedForward(join, tuple(parts), tuple(downs)) if downs else None), misses


def _unfit(anatomy: Anatomy, join: Join, candidate: Projection, taken: set[Projection]) -> NearMiss | None:
    """Why a projection that enters a join is no down projection; None where it is one."""
    frontier = anatomy.frontier(candidate.input)
    behind = [one for one in frontier.projections if one not in anatomy.routers]
    if frontier.stops:
        stop = frontier.stops[0]
        return NearMiss.at(
            "ffn.down", candidate.node, CONDITIONS, 1, f"%{stop.name} ({ops.name(stop)})", stop, join.node
        )
    if not behind:
        return NearMiss.at("ffn.down", candidate.node, CONDITIONS, 1, "no projection", candidate.input, join.node)
    attends = next((one.output for one in behind if one in taken), None)
    if attends is not None:
        return NearMiss.at(
            "ffn.down", candidate.node, CONDITIONS, 1, f"%{attends.name}, which belongs to attention", attends
        )
    if not frontier.nonlinear:
        between = sorted(frontier.between, key=anatomy.flow.order.__getitem__)
        found = ", ".join(dict.fromkeys(ops.name(one) for one in between)) or "nothing"
        sources = [one.output for one in behind]
        return NearMiss.at("ffn.down", candidate.node, CONDITIONS, 2, found, *sources, *between, join.node)
    mixing = next((one for one in behind if _mixes_positions(anatomy, one)), None)
    if mixing is not None:
        found = f"%{mixing.node.name} before it, which contracts positions, not features"
        return NearMiss.at("ffn.down", candidate.node, CONDITIONS, 3, found, mixing.node, join.node)
    flow = anatomy.flow
    values, goal = _size(flow.shape(candidate.output)), _size(flow.shape(join.node))
    if goal % candidate.width or values < goal:
        found = "one that is spread over positions, such as a gate of the branch"
        return NearMiss.at("ffn.down", candidate.node, CONDITIONS, 3, found, candidate.output, join.node)
    return None


def _local(anatomy: Anatomy, candidate: Projection) -> bool:
    return any(anatomy.flow.channelwise(node) for node in anatomy.frontier(candidate.input).between)


def _mixes_positions(anatomy: Anatomy, one: Projection) -> bool:
    """Does a projection contract another axis than the one that the norm before it normalises (an MLP-Mixer's)?"""
    flow = anatomy.flow
    here: fx.Node | None = one.input
    while here is not None and here not in anatomy.norm_at:
        here = flow.source(here)
    if here is None:
        return False
    image = ops.name(anatomy.norm_at[here].node) in ops.IMAGE_NORM
    shape = flow.shape(here)
    tags = Tagger(flow, {here: along(shape, (1 if image else len(shape) - 1,))}).run(one.input)
    arrived = tags.shape == flow.shape(one.input) and bool(tags.any())
    return arrived and not varies(tags, one.input_axis % tags.dim())


def _size(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _ups(anatomy: Anatomy, down: Projection) -> list[Part]:
    """up and gate: the two sides of the multiplication whose sides carry different features."""
    frontier = anatomy.frontier(down.input)
    sources = [one for one in frontier.projections if one not in anatomy.routers]
    sides = _gating(anatomy, down, sources)
    if sides is None:
        tags, bases = arrivals(anatomy, down.input, sources)
        arrived = split(in_order(tags), sources, bases)
        return [
            Part("ffn.up", source, columns_of(source, features))
            for source, features in zip(sources, arrived, strict=True)
            if len(features)
        ]
    parts: list[Part] = []
    for role, tags, bases, note in sides:
        for source, features in zip(sources, split(tags, sources, bases), strict=True):
            if len(features):
                parts.append(Part(role, source, columns_of(source, features), note=note))
    return sorted(parts, key=lambda part: anatomy.flow.order[part.projection.node])


def _gating(anatomy: Anatomy, down: Projection, sources: list[Projection]) -> list[Side] | None:
    """The last multiplication with disjoint features on its sides: (role, tags, bases, note) of each side."""
    between = anatomy.frontier(down.input).between
    for node in sorted(between, key=lambda one: -anatomy.flow.order[one]):
        if ops.name(node) == "glu":
            return _fused_gate(anatomy, node, sources)
        operands = [one for one in anatomy.flow.operands(node) if anatomy.flow.signal(one)]
        if ops.name(node) != "mul" or len(operands) != 2:
            continue
        tagged = [arrivals(anatomy, operand, sources) for operand in operands]
        features = [in_order(tags) for tags, _ in tagged]
        if not all(map(len, features)) or torch.equal(*features) or bool(torch.isin(*features).any()):
            continue
        bent = [_bent(anatomy, operand) for operand in operands]
        gate = 0 if bent[0] else 1
        note = "" if bent[0] != bent[1] else "both sides are nonlinear" if bent[0] else "neither side is nonlinear"
        return [
            ("ffn.gate", features[gate], tagged[gate][1], note),
            ("ffn.up", features[1 - gate], tagged[1 - gate][1], note),
        ]
    return None


def _bent(anatomy: Anatomy, node: fx.Node) -> bool:
    return anatomy.frontier(node).nonlinear


def _fused_gate(anatomy: Anatomy, node: fx.Node, sources: list[Projection]) -> list[Side]:
    """glu(x) = x[:n] * sigmoid(x[n:])."""
    axis = ops.argument(node, 1, "dim")
    tags, bases = arrivals(anatomy, anatomy.flow.operands(node)[0], sources)
    up, gate = tags.chunk(2, dim=axis if isinstance(axis, int) else -1)
    return [("ffn.up", in_order(up), bases, ""), ("ffn.gate", in_order(gate), bases, "")]
