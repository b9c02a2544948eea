"""Norms: operators and those written by hand, with what they train."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from peftgraph.sites.assign.blocks import Place
from peftgraph.sites.assign.collection import owner
from peftgraph.sites.assign.evidence import Step, step, through
from peftgraph.sites.assign.naming import module_of
from peftgraph.sites.assign.structure import Structure
from peftgraph.sites.dataflow import ops
from peftgraph.sites.matchers.norms import Norm, near_norm
from peftgraph.sites.site import Bias, NearMiss, Site


def find(structure: Structure) -> None:
    """Add a site for every norm."""
    joined = {join.node: join for join in structure.anatomy.joins}
    for norm in structure.anatomy.norms:
        before = joined.get(structure.flow.strip(norm.input))
        post = before is not None and before in structure.blocks.post
        place = structure.blocks.places.get(before) if post and before else structure.into.place(norm.output)
        if place is None and not post:
            place = _operand_place(structure, norm)
        structure.into.place_of[norm.node] = place
        bias = None if norm.bias is None else Bias(norm.bias)
        path = owner(norm.weight) if norm.weight else module_of(norm.node)
        by_channel = ops.name(norm.node) in ops.IMAGE_NORM
        structure.into.add(
            "norm",
            norm.node,
            path,
            place,
            {"input": norm.input, "output": norm.output},
            bias=bias,
            scale=norm.weight,
            feature_axis=1 - len(structure.flow.shape(norm.output)) if by_channel else -1,
        )


def evidence(structure: Structure, site: Site, node: fx.Node) -> list[Step]:
    """Say why an operation is a norm."""
    norm = next(one for one in structure.anatomy.norms if one.node is node)
    if ops.name(node) in ops.NORM:
        return [step(f"%{node.name} is {ops.name(node)} of %{norm.input.name}", norm.input, node)]
    way = structure.flow.between(norm.input, norm.output)
    verb = "divides" if ops.name(node) == "div" else "multiplies"
    gain = f", times @{norm.weight}" if norm.weight else ""
    return [
        step(
            f"%{node.name} {verb} %{norm.input.name} by a statistic of its own, one for each row "
            f"({through(one for one in way if one is not node).strip()}){gain}: a norm written by hand",
            way,
            norm.output,
        )
    ]


def near_misses(structure: Structure, role: str) -> Iterator[NearMiss]:
    """Find the products and quotients that came closest to a norm."""
    yield from filter(None, (near_norm(structure.flow, node) for node in structure.flow.nodes))


def _operand_place(structure: Structure, norm: Norm) -> Place | None:
    """Return the layer of a norm on q or k whose projection reads another stream."""
    sources = structure.anatomy.frontier(norm.input).projections
    places = [structure.into.place_of[one.node] for one in sources if one.node in structure.into.place_of]
    return places[0] if places else None
