"""Embeddings: tables that are looked up by an input of the model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from torch import fx

from peftgraph.sites.assign.collection import Ports, owner
from peftgraph.sites.assign.evidence import Step, step
from peftgraph.sites.assign.structure import Structure
from peftgraph.sites.dataflow import ops
from peftgraph.sites.site import Form, NearMiss, Site, Weight

LOOKUP: Final = ("a table lookup (embedding)", "an index that comes from an input")


def find(structure: Structure) -> None:
    """Add a site for every lookup in a stored table by an input."""
    for node in structure.flow.nodes:
        if ops.name(node) not in ("embedding", "embedding_bag") or not _looks_up_input(
            structure.flow.operands(node)[1]
        ):
            continue
        leaf = structure.flow.leaf(structure.flow.operands(node)[0])
        if leaf is not None:
            _embedding(structure, node, str(leaf.target), structure.flow.operands(node)[1])


def evidence(structure: Structure, site: Site, node: fx.Node) -> list[Step]:
    """Say which table is looked up by what."""
    index = structure.flow.operands(node)[1]
    return [step(f"%{node.name} looks up rows of a stored table by %{index.name}, which comes from an input", node)]


def near_misses(structure: Structure, role: str) -> Iterator[NearMiss]:
    """Find lookups whose index comes from no input."""
    for node in structure.flow.nodes:
        if ops.name(node) in ("embedding", "embedding_bag"):
            index = structure.flow.operands(node)[1]
            yield NearMiss.at("embedding", node, LOOKUP, 1, f"%{index.name} ({ops.name(index)})", index)


def _embedding(structure: Structure, node: fx.Node, parameter: str, index: fx.Node) -> None:
    weight = Weight(parameter, transposed=True)
    bag = ops.name(node) == "embedding_bag"  # it sums what it looks up, and gives several values
    ports: Ports = {"input": index, "output": None if bag else node}
    shape = weight.shape(structure.flow.tensors)
    form: Form = "weight" if bag else "output"
    stack = _fed_by(structure, node)
    structure.into.add(
        "embedding", node, owner(parameter), None, ports, weight=weight, shape=shape, stack=stack, form=form
    )


def _fed_by(structure: Structure, node: fx.Node) -> str | None:
    """Return the first stack whose stream starts from what `node` gives."""
    order = structure.flow.order
    places = sorted(structure.blocks.places.items(), key=lambda item: order[item[0].node])
    return next((place.stack for join, place in places if structure.flow.descends(join.root, node)), None)


def _looks_up_input(index: fx.Node) -> bool:
    """Tell whether it is an index that is an input, up to layout, casts and masking; positions, counted or given, are
    none."""
    through = ops.LAYOUT | ops.CAST | {"masked_fill", "where", "clamp", "copy", "new_zeros", "fill", "clamp_min"}
    todo, seen = [index], set[fx.Node]()
    while todo:
        node = todo.pop()
        if node.op == "placeholder":
            return not node.meta.get("default")
        if node not in seen and ops.name(node) in through:
            seen.add(node)
            todo.extend(node.all_input_nodes if ops.name(node) != "where" else node.all_input_nodes[1:])
    return False
