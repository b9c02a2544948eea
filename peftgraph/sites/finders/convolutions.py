"""Convolutions of a signal with a stored kernel, of any kernel size, stride, dilation and number of groups."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from torch import fx

from peftgraph.sites.assign.collection import owner
from peftgraph.sites.assign.evidence import Step, step
from peftgraph.sites.assign.structure import Structure
from peftgraph.sites.dataflow import ops
from peftgraph.sites.site import Bias, MatrixAxes, NearMiss, Site, Weight

DEPTHWISE: Final = "conv.depthwise"
CONDITIONS: Final = ("a convolution of a signal with a stored kernel", "a group of its own for each input channel")


def find(structure: Structure) -> None:
    """Add a site for every convolution that is no projection."""
    for node in structure.flow.nodes:
        if ops.name(node) in ops.CONV and node not in structure.anatomy.projection_at:
            _add(structure, node)


def evidence(structure: Structure, site: Site, node: fx.Node) -> list[Step]:
    """Say which kernel a convolution reads."""
    assert site.weight is not None
    found = [step(f"%{node.name} convolves a signal with the stored kernel @{site.weight.parameter}", node)]
    alone = step("it has one input channel for each group: it mixes positions and no features, a depthwise convolution")
    return [*found, alone] if site.role == DEPTHWISE else found


def near_misses(structure: Structure, role: str) -> Iterator[NearMiss]:
    """Find the convolutions that mix features, where a depthwise one is asked for."""
    for site in structure.into.found if role == DEPTHWISE else ():
        if site.role == "conv":
            node = structure.node(site.op)
            kernel = structure.flow.shape(structure.flow.operands(node)[1])
            shown = " x ".join(map(str, kernel))
            yield NearMiss.at(DEPTHWISE, node, CONDITIONS, 1, f"a kernel of {shown} in {_groups(node)} groups")


def _groups(node: fx.Node) -> int:
    groups = ops.argument(node, 6, "groups")
    return groups if isinstance(groups, int) else 1


def _add(structure: Structure, node: fx.Node) -> None:
    """Add a site for a convolution of any kernel, stride and dilation, transposed or not, with any number of groups."""
    flow = structure.flow
    image, kernel = flow.operands(node)[:2]
    computed = flow.parametrised(kernel)
    leaf = flow.parametrised_leaf(kernel) if computed else flow.uncast(kernel) if flow.raw(kernel) else None
    if leaf is None or leaf.op != "get_attr":
        return
    sizes, turned = flow.shape(leaf), "transpose" in ops.name(node)
    grouped = _groups(node)
    spatial = tuple(range(2, len(sizes)))
    if not turned:
        axes = None
    elif grouped == 1:
        axes = MatrixAxes(sizes, (), (1,), (0, *spatial))
    else:  # stored (in, out / groups, ...): each group of inputs has outputs of its own
        split = (grouped, sizes[0] // grouped, *sizes[1:])
        axes = MatrixAxes(split, (), (0, 2), (1, *(axis + 1 for axis in spatial)))
    weight = Weight(str(leaf.target), axes=axes, computed=kernel.name if computed else None)
    bias = ops.operand(node, 2, "bias")
    stored = bias and flow.leaf(bias)
    structure.into.place_of[node] = structure.into.place(node)
    structure.into.add(
        DEPTHWISE if flow.channelwise(node) else "conv",
        node,
        owner(weight.parameter),
        structure.into.place(node),
        {"input": image, "output": node},
        weight=weight,
        bias=None if stored is None else Bias(str(stored.target)),
        feature_axis=1 - len(sizes),
        form="output" if grouped == 1 else "weight",
        shape=weight.shape(flow.tensors),
    )
