"""Bases whose weights are codes: the graph reads a dequantiser in the place of a stored weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from peftgraph.ir.graphs import copy_graph, stored_tensor_nodes
from peftgraph.ir.ordering import record_order
from peftgraph.ir.quantised import COMPUTES_IN, ROUNDS, QuantisedWeight, products_of
from peftgraph.ir.shape_inference import ShapeInference, fake_like, fake_mode_of
from peftgraph.ir.tensor_table import TensorEntry, TensorTable

DEQUANTISES = "dequantises"  # in a node's metadata: the stored weight that it stands for


@dataclass(frozen=True)
class StoredCodes:
    """The codes of a weight of a model.

    Attributes:
        how: the weight is computed from its tensors.
        tensors: of that, by name.
        dtype: that the rest of the model has.
        compute: the dtype that products with it are computed in; None for that of what is multiplied.
    """

    how: QuantisedWeight
    tensors: Mapping[str, Tensor]
    dtype: torch.dtype
    compute: torch.dtype | None


def read_codes(graph: fx.Graph, table: TensorTable, coded: Mapping[str, StoredCodes]) -> TensorTable:
    """Let a base graph, in place, read codes where it reads some weights; returns the table with them.

    Args:
        graph: of the base.
        table: of the base.
        coded: the codes, by the name of the weight.
    """
    inference = ShapeInference(fake_mode_of(graph))
    for node in [node for node in stored_tensor_nodes(graph) if str(node.target) in coded]:
        _read_codes(graph, node, coded[str(node.target)], inference)
    stand_ins: dict[int, nn.Parameter] = {}
    for name, one in coded.items():
        entry = table[name]
        empty = torch.empty(entry.tensor.shape, dtype=one.dtype, device="meta")
        tensor = stand_ins.setdefault(id(entry.tensor), nn.Parameter(empty, requires_grad=False))
        table = table.updated({name: replace(entry, tensor=tensor, quantised=one.how)})
        codes = {full: TensorEntry(value, "buffer", keeps_dtype=True) for full, value in one.tensors.items()}
        table = table.updated(codes)
    record_order(graph)
    return table


def _read_codes(graph: fx.Graph, node: fx.Node, one: StoredCodes, inference: ShapeInference) -> None:
    users = list(node.users)
    value = _dequantiser(graph, node, one, inference)
    for user in users:
        user.replace_input_with(node, value)
    value.meta[DEQUANTISES] = str(node.target)
    if one.compute is not None and one.compute != one.dtype:
        for product, _, _ in products_of(value):
            product.meta[COMPUTES_IN] = one.compute


def _dequantiser(graph: fx.Graph, node: fx.Node, one: StoredCodes, inference: ShapeInference) -> fx.Node:
    """Return the nodes that compute a weight, behind `node`, in the dtype of the model."""
    arguments: list[Any] = []
    cursor = node
    for given in one.how.arguments:
        if isinstance(given, str):
            with graph.inserting_after(cursor):
                cursor = graph.create_node("get_attr", given, name=f"{node.name}_{given.rpartition('_')[2]}")
            cursor.meta["val"] = fake_like(inference.mode, one.tensors[given])
        arguments.append(cursor if isinstance(given, str) else given)
    with graph.inserting_after(cursor):
        value = graph.create_node(
            "call_function", one.how.dequantise, tuple(arguments), name=f"{node.name}_dequantised"
        )
    value.meta |= {"val": inference.value_of(value), ROUNDS: True}
    place = next(i for i, given in enumerate(arguments) if isinstance(given, torch.dtype))
    value.meta["follows"] = ((("args", place), "dtype"),)
    return value


def without_codes(graph: fx.Graph) -> fx.Graph:
    """Return a copy of a graph that reads weights where it read their codes; other nodes keep their names."""
    new = copy_graph(graph)
    stored = {str(node.target): node for node in stored_tensor_nodes(new) if "origin" not in node.meta}
    for node in [node for node in new.nodes if DEQUANTISES in node.meta]:
        for product, _, _ in products_of(node):
            product.meta.pop(COMPUTES_IN, None)
        node.replace_all_uses_with(stored[node.meta[DEQUANTISES]])
        gone = [node]
        while gone:
            one = gone.pop()
            operands = one.all_input_nodes
            if not one.users:
                new.erase_node(one)
                gone += [operand for operand in operands if not operand.users]
    return new


def dequantiser_names(graph: fx.Graph) -> dict[str, str]:
    """Return the nodes that stand for stored weights, with the nodes that read these."""
    stored = {str(node.target): node.name for node in stored_tensor_nodes(graph) if "origin" not in node.meta}
    return {node.name: stored[node.meta[DEQUANTISES]] for node in graph.nodes if DEQUANTISES in node.meta}
