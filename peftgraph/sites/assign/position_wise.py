"""Whether a would-be feed-forward treats every position alone: mixers, convolutions and gates of a branch do not."""

from __future__ import annotations

from math import prod

from torch import fx

from peftgraph.sites.assign.gates import gating, sources_of
from peftgraph.sites.dataflow import ops
from peftgraph.sites.dataflow.flow import Flow
from peftgraph.sites.dataflow.products import factors, spelled
from peftgraph.sites.dataflow.tags import Tagger, along, varies
from peftgraph.sites.matchers.anatomy import Anatomy
from peftgraph.sites.matchers.projections import Projection
from peftgraph.sites.matchers.residual_adds import Join


def mixed(
    anatomy: Anatomy, join: Join, candidate: Projection, goal: fx.Node, attended: set[fx.Node]
) -> tuple[str, fx.Node] | None:
    """Return what brings positions together before or behind a projection whose result becomes `goal`, and where; None
    where nothing does."""
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
    """Tell whether a result is added to parallel streams, with a weight for each (hyper-connections, arXiv
    2409.19606)."""
    flow = anatomy.flow
    for node in anatomy.frontier(join.branch).between:
        sides = sorted(_factors(node), key=lambda one: flow.descends(one, candidate.output))
        if len(sides) == 2 and flow.descends(sides[1], candidate.output) and _is_outer(flow, node, *sides):
            return True
    return False


def _factors(node: fx.Node) -> list[fx.Node]:
    pair = [one for one in node.args if isinstance(one, fx.Node)] if ops.name(node) == "mul" else factors(node)
    return list(pair or ())


def _is_outer(flow: Flow, node: fx.Node, weights: fx.Node, values: fx.Node) -> bool:
    """Tell whether a product multiplies values by one weight for each of several streams, not for each feature."""
    named = spelled(node)
    if named is not None:
        side = 0 if factors(node) == (values, weights) else 1
        return not named.summed(0) and not named.summed(1) and named.result[-1] not in named.of(1 - side)
    sizes, given, shape = flow.shape(weights), flow.shape(values), flow.shape(node)
    given = (1,) * (len(shape) - len(given)) + given
    spread = [axis for axis, (a, b) in enumerate(zip(given, shape, strict=True)) if a != b]
    return sizes[-1:] == (1,) and len(spread) == 1 and given[spread[0]] == 1 and spread[0] < len(shape) - 1


def _mixes_positions(anatomy: Anatomy, one: Projection) -> bool:
    """Tell whether a projection contracts another axis than the norm before it normalises, as an MLP-Mixer's does."""
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
