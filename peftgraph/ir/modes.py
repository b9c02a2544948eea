"""Derives the graphs that run in training and in evaluation mode from the one that is stored.

A program is traced in training mode, with dropout. Evaluation removes dropout, so its graph contains no node that does
nothing. Where a model computes different values in the two modes, a `by_mode` node selects between them. Leaving out
an optional input (labels) removes the nodes that depend on it.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from typing import TypeVar

import torch
from torch import fx
from torch.fx.node import map_arg

from peftgraph.errors import CallError
from peftgraph.ir.dead_code import remove_dead_nodes, writes_in_place
from peftgraph.ir.graphs import copy_graph
from peftgraph.ir.quantised import fuse_dequantised_products

T = TypeVar("T")
aten = torch.ops.aten
DROPOUTS = {
    aten.dropout.default,
    aten.dropout_.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
    aten.feature_alpha_dropout.default,
}
# Where other operations carry training behaviour: operator -> (position, name, value under eval()).
TRAINING_ARGUMENTS: dict[Callable[..., object], tuple[int, str, object]] = {
    aten.scaled_dot_product_attention.default: (4, "dropout_p", 0.0),
    aten.rrelu.default: (3, "training", False),
    aten.lstm.input: (6, "train", False),
    aten.gru.input: (6, "train", False),
    aten.rnn_tanh.input: (6, "train", False),
    aten.rnn_relu.input: (6, "train", False),
}
# Norms by the statistics of a batch: under eval() as well where they keep none (their fourth operand is None).
BATCH_STATISTICS = {aten.batch_norm.default: "training", aten.instance_norm.default: "use_input_stats"}

SEQUENCE_AXIS = 2  # the axis of keys and values of earlier calls along which there is one row a token


def by_mode(evaluation: T, training: T) -> T:
    """Serve as the target of a node that selects a value by mode; it is resolved before a graph runs."""
    return training


def training_graph(graph: fx.Graph) -> fx.Graph:
    """Return a copy of `graph` as it runs in training mode."""
    return _one_side(graph, 1, "evaluation_only")


def evaluation_graph(graph: fx.Graph) -> fx.Graph:
    """Return a copy of `graph` as it runs in evaluation mode."""
    new = _one_side(graph, 0, "training_only")
    for node in list(new.nodes):
        if node.op != "call_function":
            continue
        if node.target in DROPOUTS or node.meta.get("evaluates_to_first_operand"):
            source = node.args[0]
            assert isinstance(source, fx.Node)
            node.replace_all_uses_with(source)
            new.erase_node(node)
        elif node.target in BATCH_STATISTICS:
            _set_argument(node, 5, BATCH_STATISTICS[node.target], node.args[3] is None)
        elif node.target in TRAINING_ARGUMENTS:
            _set_argument(node, *TRAINING_ARGUMENTS[node.target])
    remove_dead_nodes(new)
    return new


def _one_side(graph: fx.Graph, side: int, other: str) -> fx.Graph:
    """Copy a graph, resolving every `by_mode`; writes marked as belonging to the `other` mode are removed."""
    new = copy_graph(graph)
    for node in list(new.nodes):
        if node.target is by_mode:
            value = node.args[side]
            assert isinstance(value, fx.Node)
            node.replace_all_uses_with(value)
            new.erase_node(node)
    fuse_dequantised_products(new)
    remove_dead_nodes(new, other)
    return new


def without_inputs(graph: fx.Graph, missing: Set[str]) -> tuple[fx.Graph, tuple[bool, ...]]:
    """Return a copy of `graph` without the inputs in `missing`, and a flag for each output leaf: whether it remains.

    Raises:
        CallError: every output depends on a missing input.
    """
    new = copy_graph(graph)
    reached: set[fx.Node] = set()
    for node in new.nodes:
        absent = node.op == "placeholder" and node.name in missing
        if absent or any(operand in reached for operand in node.all_input_nodes):
            reached.add(node)
    output = new.output_node()
    leaves = output.args[0]
    assert isinstance(leaves, list | tuple)
    kept = tuple(not (isinstance(leaf, fx.Node) and leaf in reached) for leaf in leaves)
    if not any(leaf is not None and keep for leaf, keep in zip(leaves, kept, strict=True)):
        names = ", ".join(sorted(missing))
        raise CallError(
            f"Missing input {names}: the model was traced with it and every output depends on it. Pass it, or "
            f"trace the model again without it."
        )
    output.args = ([leaf if keep else None for leaf, keep in zip(leaves, kept, strict=True)],)
    for node in reversed(list(new.nodes)):
        if (
            node in reached
            and node.op != "output"
            and not node.users
            and (node.op != "placeholder" or node.name in missing)
        ):
            new.erase_node(node)
    remove_dead_nodes(new)
    return new, kept


def without_cached_inputs(graph: fx.Graph, past: Set[str]) -> fx.Graph:
    """Return a copy of `graph` for a first call, without the cached keys and values in `past`."""
    new = copy_graph(graph)
    inputs = [node for node in new.nodes if node.op == "placeholder"]
    for node in [node for node in inputs if node.name in past]:
        for user in list(node.users):
            if user.target is aten.cat.default:
                operands, *rest = user.args
                assert isinstance(operands, list | tuple)
                user.args = ([one for one in operands if one is not node], *rest)
                _skip_single(user)
            else:
                assert user.target is aten.sym_size.int, user
                if user.args[1] == SEQUENCE_AXIS:
                    _replace(user, 0)
                else:
                    read_size_from(user, [one for one in inputs if one.name not in past])
        new.erase_node(node)
    return new


def _skip_single(cat: fx.Node) -> None:
    operands = cat.args[0]
    assert isinstance(operands, list | tuple)
    if len(operands) == 1:
        assert isinstance(operands[0], fx.Node)
        cat.replace_all_uses_with(operands[0])
        cat.graph.erase_node(cat)


def read_size_from(size: fx.Node, inputs: list[fx.Node]) -> None:
    """Redirect a size node, in place, to the first of `inputs` that has this size; unchanged where none has."""
    symbol = str(size.meta["val"])
    for node in inputs:
        for axis, other in enumerate(node.meta["val"].shape):
            if str(other) == symbol:
                size.args = (node, axis)
                return


def _replace(node: fx.Node, value: int) -> None:
    for user in list(node.users):
        user.args, user.kwargs = map_arg((user.args, user.kwargs), lambda one: value if one is node else one)
    node.graph.erase_node(node)


def written_buffers(graph: fx.Graph) -> set[str]:
    """Return the names of stored tensors that the graph writes into, such as running statistics, also through views."""
    return {str(root.target) for root in written_inputs(graph) if root.op == "get_attr"}


def written_inputs(graph: fx.Graph) -> set[fx.Node]:
    """Return the inputs and stored tensors that the graph writes into, also through views."""
    roots = (_root(value) for node in graph.nodes if writes_in_place(node) for value in _written(node))
    return {root for root in roots if root.op in ("get_attr", "placeholder")}


def _written(node: fx.Node) -> list[fx.Node]:
    """Return the operands that a node writes into."""
    assert isinstance(node.target, torch._ops.OpOverload)
    if node.target in BATCH_STATISTICS:  # its schema does not say so: the running mean and variance
        return [value for value in node.args[3:5] if isinstance(value, fx.Node)]
    arguments = node.target._schema.arguments
    values = [*node.args, *(node.kwargs.get(one.name) for one in arguments[len(node.args) :])]
    written = [
        value for one, value in zip(arguments, values, strict=True) if one.alias_info and one.alias_info.is_write
    ]
    return [value for value in written if isinstance(value, fx.Node)]


def _root(node: fx.Node) -> fx.Node:
    """Return the value that owns the memory of a view."""
    while isinstance(node.target, torch._ops.OpOverload) and isinstance(node.args[0], fx.Node):
        if not any(one.alias_info for one in node.target._schema.returns):
            break
        node = node.args[0]
    return node


def _set_argument(node: fx.Node, position: int, name: str, value: object) -> None:
    """Set an argument that is present; trailing arguments equal to their defaults are dropped, as the exporter does."""
    assert isinstance(node.target, torch._ops.OpOverload)
    schema = node.target._schema.arguments
    if len(node.args) == position + 1 and schema[position].default_value == value:
        while position and schema[position - 1].has_default_value() and _is_default(node, position - 1):
            position -= 1
        node.args = node.args[:position]
    elif len(node.args) > position:
        node.update_arg(position, value)  # pyright: ignore[reportArgumentType]
    elif name in node.kwargs:
        node.update_kwarg(name, value)  # pyright: ignore[reportArgumentType]


def _is_default(node: fx.Node, position: int) -> bool:
    assert isinstance(node.target, torch._ops.OpOverload)
    given = node.args[position]
    return not isinstance(given, fx.Node) and given == node.target._schema.arguments[position].default_value
