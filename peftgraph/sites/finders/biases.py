"""Biases: stored vectors that are added to what an operator gives, at every use."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import fx

from peftgraph.sites.assign.blocks import Place
from peftgraph.sites.assign.evidence import Step, step
from peftgraph.sites.assign.structure import Structure
from peftgraph.sites.dataflow import ops
from peftgraph.sites.site import Bias, NearMiss, Site


def find(structure: Structure) -> None:
    """Add a site for every additive bias vector, at every use."""
    for parameter, op, output, place in _bias_uses(structure):
        shape = tuple(int(size) for size in structure.flow.tensors[parameter].shape)
        structure.into.add("bias", op, parameter, place, {"output": output}, bias=Bias(parameter), shape=shape)


def evidence(structure: Structure, site: Site, node: fx.Node) -> list[Step]:
    """Say where the vector is added."""
    where = "by the operator itself" if site.ports["output"] == node.name else f"in %{site.ports['output']}"
    output = next(one for one in structure.flow.nodes if one.name == site.ports["output"])
    return [step(f"the vector @{site.path} is added to the result of %{node.name}, {where}", node, output)]


def near_misses(structure: Structure, role: str) -> Iterator[NearMiss]:
    """Find nothing: a stored vector is added or it is not."""
    return iter(())


def _bias_uses(structure: Structure) -> Iterable[tuple[str, fx.Node, fx.Node, Place | None]]:
    flow, seen = structure.flow, set[fx.Node]()
    for one in structure.anatomy.projections:
        seen |= {one.node, one.output}
        if one.bias is not None:
            yield one.bias.parameter, one.node, one.output, structure.into.place_of.get(one.node)
    for norm in structure.anatomy.norms:
        seen |= {norm.node, norm.output}
        if norm.bias is not None:
            yield norm.bias, norm.node, norm.output, structure.into.place_of.get(norm.node)
    for node in flow.nodes:
        vector = None
        if ops.name(node) in ops.CONV:
            vector = ops.operand(node, 2, "bias")
        elif ops.name(node) == "add" and not flow.constant(node):  # a gain of 1 + w is no bias
            vector = next((one for one in flow.operands(node) if flow.raw(one)), None)
        leaf = None if vector is None else flow.leaf(vector)
        if node not in seen and leaf is not None and flow.floating(leaf) and len(flow.shape(leaf)) == 1:
            yield str(leaf.target), node, node, structure.into.place(node)
