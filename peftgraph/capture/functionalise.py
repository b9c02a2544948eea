"""Operations in place become operations out of place, so that rewrites beside them are safe and dataflow is all
there is to read: a value that is filled piece by piece through views becomes a chain of scatters."""

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
    "add sub mul div neg abs exp log sqrt rsqrt square pow floor ceil round clamp clamp_min clamp_max detach"
)
# Likewise, and whatever it writes takes the dtype of what is written into.
WRITERS = "masked_fill fill zero index_put index_copy index_add index_fill scatter scatter_add masked_scatter"
# Views for certain: `reshape`, `contiguous` and `to` may also copy, and whether a later write shows in them is open.
VIEWS = (
    "slice select narrow transpose permute t unsqueeze squeeze view expand alias detach split split_with_sizes "
    "chunk unbind getitem movedim swapaxes"
)


def functionalise_graph(graph: fx.Graph) -> None:
    """Replace every in-place operation whose effect is known from the graph; the graph is changed in place.

    What writes into a stored buffer stays (running statistics), and so does what writes through a view that may be
    a copy.

    Raises:
        TraceError: an operation writes into an input of the model.
    """
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
        if root.op != "get_attr":
            _functional(graph, node, written, root)


def _functional(graph: fx.Graph, node: fx.Node, written: fx.Node, root: fx.Node) -> None:
    """Turn one write into a new value of `root`, and redirect all later reads of the memory to it."""
    chain = _chain(written, root)
    stale = [other for other in _shared(root) if other < node and any(node < user for user in other.users)]
    if not all(_invertible(view) for view in chain) or not all(_is_view(other, root) for other in stale):
        return
    with graph.inserting_before(node):
        fresh = _value(graph, node, written)
        if fresh is None:
            return
        for view in chain:
            fresh = _scattered(graph, view, fresh)
        renewed = {root: fresh}
        for other in (*stale, *([written] if node.users else [])):
            _renew(graph, other, renewed)
    if node.users:
        node.replace_all_uses_with(renewed[written])
    for other in stale:
        for user in [user for user in other.users if node < user]:
            user.replace_input_with(other, renewed[other])
    graph.erase_node(node)


def _shared(root: fx.Node) -> list[fx.Node]:
    """Return the values that may share the root's memory, itself included."""
    found = [root]
    for node in found:
        found.extend(user for user in node.users if _viewed(user) is node)
    return found


def _renew(graph: fx.Graph, view: fx.Node, renewed: dict[fx.Node, fx.Node]) -> fx.Node:
    """Repeat a view on the memory's new value."""
    if view not in renewed:
        source = _viewed(view)
        assert source is not None
        fresh = _renew(graph, source, renewed)
        renewed[view] = graph.node_copy(view, lambda operand: fresh if operand is source else operand)
        renewed[view].meta = dict(view.meta)
    return renewed[view]


def _is_view(node: fx.Node, root: fx.Node) -> bool:
    """Tell whether the node certainly shares the root's memory."""
    while node is not root:
        source = _viewed(node)
        if source is None or _name(node) not in VIEWS.split():
            return False
        node = source
    return True


def _chain(written: fx.Node, root: fx.Node) -> list[fx.Node]:
    """Return the views between a written value and its root, last first."""
    chain: list[fx.Node] = []
    while written is not root:
        chain.append(written)
        source = _viewed(written)
        assert source is not None
        written = source
    return chain


def _invertible(view: fx.Node) -> bool:
    return _name(view) in ("slice", "select", "transpose", "alias")


def _scattered(graph: fx.Graph, view: fx.Node, value: fx.Node) -> fx.Node:
    """Return the source of `view` with `value` written into the viewed region."""
    source = view.args[0]
    assert isinstance(source, fx.Node)
    if _name(view) == "alias":
        return value
    if _name(view) == "transpose":
        new = graph.call_function(aten.transpose.int, (value, *view.args[1:]))
    else:
        scatter = aten.slice_scatter.default if _name(view) == "slice" else aten.select_scatter.default
        new = graph.call_function(scatter, (source, value, *view.args[1:]), dict(view.kwargs))
    new.meta = dict(source.meta)
    return new


def _value(graph: fx.Graph, node: fx.Node, written: fx.Node) -> fx.Node | None:
    """Return the value that `node` leaves in `written`; None where no out-of-place operator computes it."""
    if _name(node) == "copy_":
        return _copied(graph, node, written)
    twin = _twin(node)
    if twin is None:
        return None
    new = graph.call_function(twin, node.args, node.kwargs)
    new.meta = dict(node.meta)
    return new


def _copied(graph: fx.Graph, node: fx.Node, written: fx.Node) -> fx.Node | None:
    """Return the source of a copy, in the dtype and the shape of its target."""
    value = node.args[1]
    if not isinstance(value, fx.Node):
        return None
    source, target = value.meta.get("val"), written.meta.get("val")
    if not isinstance(source, Tensor) or not isinstance(target, Tensor) or source.device != target.device:
        return None
    if source.dtype != target.dtype:
        value = graph.call_function(aten.to.other, (value, written))
        value.meta = {**node.meta, "val": source.to(target.dtype)}
    if tuple(source.shape) != tuple(target.shape):
        value = graph.call_function(aten.expand_as.default, (value, written))
        value.meta = dict(node.meta)
    return value


def _written(node: fx.Node) -> fx.Node | None:
    """Return the operand that a node writes into."""
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
    """Return the operand whose memory a value may share."""
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
    """Return the value whose memory `node` may share, found through views."""
    while (source := _viewed(node)) is not None:
        node = source
    return node


def _twin(node: fx.Node) -> torch._ops.OpOverload | None:
    """Return the out-of-place operator that computes the same value, if there is one."""
    assert isinstance(node.target, torch._ops.OpOverload)
    name = _name(node).removesuffix("_")
    if name in WRITERS.split():
        return getattr(getattr(aten, name), node.target._overloadname)
    if name not in TWINS.split():
        return None
    tensors = [value.meta.get("val") for value in node.all_input_nodes]
    dtypes = {v.dtype for v in tensors if isinstance(v, Tensor) and v.dtype != torch.bool}
    if len(dtypes) != 1:
        return None  # out of place, the result would have another dtype
    return getattr(getattr(aten, name), node.target._overloadname)


def _name(node: fx.Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return schema.name.split("::")[-1] if schema is not None else getattr(node.target, "__name__", "")


def _dtype(node: fx.Node) -> torch.dtype | None:
    value = node.meta.get("val")
    return value.dtype if isinstance(value, Tensor) else None
