"""Joins the products of one value with several stored matrices: q, k and v, gate and up, and what passes added to them.

    x W1^T + b1, x W2^T + b2   ->   split(x [W1; W2]^T + [b1; b2])
    (w * x) W^T                ->   x (W diag(w))^T                  in single and double precision

The joined matrices are computed from the stored ones once (`stages.py`).
"""

from __future__ import annotations

import operator
from collections import defaultdict
from typing import Any

import torch
from torch import fx

from peftgraph.optimise.affine_values import DTYPES
from peftgraph.optimise.clean_up import remove_unused, value_of
from peftgraph.optimise.insertion import Inserter
from peftgraph.optimise.stages import Stage, stages_of, stored_first

aten = torch.ops.aten


def join_siblings(graph: fx.Graph) -> None:
    """Compute, in place, the products of one value with stored matrices as one product and split its result."""
    stored_first(graph)
    stages, make = stages_of(graph), Inserter(graph)
    siblings: dict[Any, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        if _is_stored_product(node, stages):
            weight = value_of(node.args[1])
            siblings[node.args[0], weight.dtype, weight.device].append(node)
    for (x, *_), products in siblings.items():
        if len(products) > 1:
            _join(make, x, products)
    remove_unused(graph)


def _is_stored_product(node: fx.Node, stages: dict[fx.Node, Stage]) -> bool:
    if node.target is not aten.linear.default or stages[node] is not Stage.VALUES:
        return False
    stored = [one for one in node.args[1:] if one is not None]
    if not all(isinstance(one, fx.Node) and stages[one] is Stage.STORED for one in stored):
        return False
    return value_of(stored[0]).dim() == 2 and all(value_of(one).dim() == 1 for one in stored[1:])


def _join(make: Inserter, x: fx.Node, products: list[fx.Node]) -> None:
    """Replace products by one, at the place of the first, above which all that is stored has been moved."""
    with make.graph.inserting_before(products[0]):
        joined = make.call(aten.cat.default, [one.args[1] for one in products], 0)
        biases = [] if all(_bias(one) is None for one in products) else [_joined_bias(make, products)]
        total = make.call(aten.linear.default, x, joined, *biases)
        widths = [int(value_of(one).shape[-1]) for one in products]
        parts = make.call(aten.split_with_sizes.default, total, widths, -1)
        for i, one in enumerate(products):
            one.replace_all_uses_with(make.call(operator.getitem, parts, i))
    for one in products:
        make.graph.erase_node(one)


def _bias(node: fx.Node) -> Any:
    return node.args[2] if len(node.args) > 2 else None


def _joined_bias(make: Inserter, products: list[fx.Node]) -> fx.Node:
    found: list[Any] = []
    for one in products:
        weight: Any = one.args[1]
        width = int(value_of(weight).shape[0])
        found.append(_bias(one) or make.call(aten.new_zeros.default, weight, [width]))
    return make.call(aten.cat.default, found, 0)


def scale_weights(graph: fx.Graph) -> None:
    """Multiply the columns of a matrix that is computed anyway, in place of the value that it multiplies, by a stored
    vector."""
    stages, make = stages_of(graph), Inserter(graph)
    for node in list(graph.nodes):
        if not _is_stored_product(node, stages) or value_of(node).dtype not in DTYPES:
            continue
        if node.args[1].op == "get_attr":  # a copy for one call less
            continue
        scaled: Any = node.args[0]
        if scaled.target is not aten.mul.Tensor or len(scaled.users) > 1:
            continue
        for vector, x in (scaled.args, scaled.args[::-1]):
            if (
                _is_vector(vector, scaled, stages)
                and isinstance(x, fx.Node)
                and value_of(x).shape == value_of(scaled).shape
            ):
                with graph.inserting_before(node):
                    weight = make.call(aten.mul.Tensor, node.args[1], vector)
                node.args = (x, weight, *node.args[2:])
                break
    remove_unused(graph)


def _is_vector(vector: Any, scaled: fx.Node, stages: dict[fx.Node, Stage]) -> bool:
    if not isinstance(vector, fx.Node) or stages.get(vector) is not Stage.STORED:
        return False
    value = value_of(vector)
    return value.dim() == 1 and value.dtype == value_of(scaled).dtype and value.shape[0] == value_of(scaled).shape[-1]
