"""Operations in place become operations out of place, so that a rewrite beside them is safe."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, fx

from peftgraph.errors import TraceError
from peftgraph.ir.modes import DROPOUTS

aten = torch.ops.aten
# What has a twin out of place that gives the same bits.
TWINS = (
    "relu relu6 leaky_relu elu selu celu silu mish hardtanh hardswish hardsigmoid threshold sigmoid tanh "
    "add sub mul div neg abs exp log sqrt rsqrt square pow floor ceil round clamp clamp_min clamp_max "
    "masked_fill detach"
)


def out_of_place(graph: fx.Graph) -> None:
    """Replaces, in place, every operation in place whose effect nobody sees but through its result.

    What writes into a stored buffer stays (running statistics), and so does what writes through a view.

    Raises:
        TraceError: an operation writes into an input of the model.
    """
    position = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        written = _written(node)
        if written is None:
            continue
        root = _root(written)
        if root.op == "placeholder":
            name = root.meta["label"]
            raise TraceError(
                f"The model writes into its input {name!r} in place ({_name(node)}). Let it work on a copy: "
                f"{name} = {name}.clone()."
            )
        twin = _twin(node)
        if root.op == "get_attr" or twin is None or _is_seen(graph, node, written, root, position):
            continue
        with graph.inserting_before(node):
            new = graph.call_function(twin, node.args, node.kwargs)
        new.meta = dict(node.meta)
        position[new] = position[node]
        node.replace_all_uses_with(new)
        for user in [user for user in written.users if position[user] > position[node]]:
            user.replace_input_with(written, new)
        graph.erase_node(node)


def _written(node: fx.Node) -> fx.Node | None:
    """The operand that a node writes into."""
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
        return None
    for argument, value in _arguments(node):
        if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, fx.Node):
            return value
    return None


def _arguments(node: fx.Node) -> Iterator[tuple[torch.Argument, object]]:
    assert isinstance(node.target, torch._ops.OpOverload)
    for i, argument in enumerate(node.target._schema.arguments):
        yield argument, node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)


def _viewed(node: fx.Node) -> fx.Node | None:
    """The operand whose memory a value may share."""
    if node.op != "call_function":
        return None
    first = node.args[0] if node.args else None
    if getattr(node.target, "__name__", "") == "getitem" or node.target in DROPOUTS:  # eval() leaves dropout out
        return first if isinstance(first, fx.Node) else None
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    returns = node.target._schema.returns
    if not returns or returns[0].alias_info is None:
        return None
    for argument, value in _arguments(node):
        if argument.alias_info is not None and isinstance(value, fx.Node):
            return None if _dtype(value) != _dtype(node) and _dtype(node) is not None else value
    return None


def _root(node: fx.Node) -> fx.Node:
    """The value whose memory `node` may share, found through views."""
    while (source := _viewed(node)) is not None:
        node = source
    return node


def _is_seen(graph: fx.Graph, node: fx.Node, written: fx.Node, root: fx.Node, position: dict[fx.Node, int]) -> bool:
    """Whether a later node reads the written memory under another name than `written` or the result."""
    derived = {node}
    for other in graph.nodes:
        if position[other] <= position[node] or other in derived:
            continue
        source = _viewed(other)
        if source in derived or source is written:
            derived.add(other)
    for other in graph.nodes:
        if other in derived or other is written or _root(other) is not root:
            continue
        if any(position[user] > position[node] for user in other.users):
            return True
    return False


def _twin(node: fx.Node) -> torch._ops.OpOverload | None:
    """The operator out of place that gives the same value, when there is one."""
    assert isinstance(node.target, torch._ops.OpOverload)
    name = _name(node).removesuffix("_")
    if name not in TWINS.split():
        return None
    tensors = [value.meta.get("val") for value in node.all_input_nodes]
    dtypes = {v.dtype for v in tensors if isinstance(v, Tensor) and v.dtype != torch.bool}
    if len(dtypes) != 1:
        return None  # out of place, the result would have another dtype
    return getattr(getattr(aten, name), node.target._overloadname)


def _name(node: fx.Node) -> str:
    assert isinstance(node.target, torch._ops.OpOverload)
    return node.target._schema.name.split("::")[-1]


def _dtype(node: fx.Node) -> torch.dtype | None:
    value = node.meta.get("val")
    return value.dtype if isinstance(value, Tensor) else None
