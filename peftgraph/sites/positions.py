"""Whether a would-be feed-forward treats every position alone: mixers, convolutions and gates of a branch do not."""

from __future__ import annotations

from math import prod

from torch import fx

from . import ops
from .anatomy import Anatomy
from .gates import gating, sources_of
from .joins import Join
from .projections import Projection
from .tags import Tagger, along, varies


def mixed(
    anatomy: Anatomy, join: Join, candidate: Projection, goal: fx.Node, attended: set[fx.Node]
) -> tuple[str, fx.Node] | None:
    """What brings positions together before or behind a projection whose result becomes `goal`, and where; None where
    nothing does."""
    flow, behind = anatomy.flow, sources_of(anatomy, candidate)
    across = next((one for one in behind if _mixes_positions(anatomy, one)), None)
    if across is not None:
        return f"%{across.node.name} before it, which contracts positions, not features", across.node
    values, wanted = prod(flow.shape(candidate.output)), prod(flow.shape(goal))
    fewer = values < wanted and flow.counted(candidate.output)
    if wanted % candidate.width or (fewer and not _handed_out(anatomy, join, candidate)):
        return "one that is spread over positions, such as a gate of the branch", candidate.output
    convolutions = [node for node in anatomy.frontier(candidate.input).between if flow.channelwise(node)]
    if convolutions and join.root not in attended:
        return "a depthwise convolution inside it, and no attention on its stream", candidate.input
    gate = gating(anatomy, candidate, behind) if convolutions else None
    if gate is not None and any(flow.descends(node, gate[0]) for node in convolutions):
        return f"a depthwise convolution of what %{gate[0].name} gates", gate[0]
    return None


def _handed_out(anatomy: Anatomy, join: Join, candidate: Projection) -> bool:
    """Is a result added to parallel streams, with a weight for each (hyper-connections, arXiv 2409.19606)?"""
    flow = anatomy.flow
    for node in anatomy.frontier(join.branch).between:
        sides = sorted(flow.operands(node), key=lambda one: flow.descends(one, candidate.output))
        if ops.name(node) == "mul" and len(sides) == 2 and flow.descends(sides[1], candidate.output):
            weights, values, product = flow.shape(sides[0]), flow.shape(sides[1]), flow.shape(node)
            if weights == (*product[:-1], 1) and values == (*product[:-2], 1, *product[-1:]):
                return True
    return False


def _mixes_positions(anatomy: Anatomy, one: Projection) -> bool:
    """Does a projection contract another axis than the one that the norm before it normalises (an MLP-Mixer's)?"""
    flow = anatomy.flow
    here: fx.Node | None = one.input
    while here is not None and here not in anatomy.norm_at:
        here = flow.source(here)
    if here is None:
        return False
    shape = flow.shape(here)
    tags = Tagger(flow, {here: along(shape, (anatomy.norm_at[here].axis % len(shape),))}).run(one.input)
    arrived = tags.shape == flow.shape(one.input) and bool(tags.any())
    return arrived and not varies(tags, one.input_axis % tags.dim())
