"""Sites that are seen at a glance: embeddings, and every bias vector that is added."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from . import ops
from .blocks import Place
from .collect import Collection, Ports, owner
from .site import Bias, Weight


def add_embeddings(into: Collection) -> None:
    for node in into.flow.nodes:
        if ops.name(node) not in ("embedding", "embedding_bag") or not _looks_up_input(into.flow.operands(node)[1]):
            continue
        leaf = into.flow.leaf(into.flow.operands(node)[0])
        if leaf is not None:
            _embedding(into, node, str(leaf.target), into.flow.operands(node)[1])


def _embedding(into: Collection, node: fx.Node, parameter: str, index: fx.Node) -> None:
    weight = Weight(parameter, transposed=True)
    ports: Ports = {"input": index, "output": node}
    shape = weight.shape(into.flow.tensors)
    stack = _fed_by(into, node)
    into.add("embedding", node, owner(parameter), None, ports, weight=weight, shape=shape, stack=stack)


def _fed_by(into: Collection, node: fx.Node) -> str | None:
    """The first stack whose stream starts from what `node` gives."""
    order = into.flow.order
    places = sorted(into.blocks.places.items(), key=lambda item: order[item[0].node])
    return next((place.stack for join, place in places if into.flow.descends(join.root, node)), None)


def add_biases(into: Collection) -> None:
    """Every additive bias vector, at every use."""
    for parameter, op, output, place in _bias_uses(into):
        shape = tuple(int(size) for size in into.flow.tensors[parameter].shape)
        into.add("bias", op, parameter, place, {"output": output}, bias=Bias(parameter), shape=shape)


def _bias_uses(into: Collection) -> Iterable[tuple[str, fx.Node, fx.Node, Place | None]]:
    flow, seen = into.flow, set[fx.Node]()
    for one in into.anatomy.projections:
        seen |= {one.node, one.output}
        if one.bias is not None:
            yield one.bias.parameter, one.node, one.output, into.place_of.get(one.node)
    for norm in into.anatomy.norms:
        seen |= {norm.node, norm.output}
        if norm.bias is not None:
            yield norm.bias, norm.node, norm.output, into.place_of.get(norm.node)
    for node in flow.nodes:
        vector = None
        if ops.name(node) in ops.CONV:
            vector = ops.operand(node, 2, "bias")
        elif ops.name(node) == "add" and not flow.constant(node):  # a gain of 1 + w is no bias
            vector = next((one for one in flow.operands(node) if flow.raw(one)), None)
        leaf = None if vector is None else flow.leaf(vector)
        if node not in seen and leaf is not None and flow.floating(leaf) and len(flow.shape(leaf)) == 1:
            yield str(leaf.target), node, node, into.place(node)


def _looks_up_input(index: fx.Node) -> bool:
    """An index that is an input, up to layout, casts and masking; positions, counted or given, are none."""
    through = ops.LAYOUT | ops.CAST | {"masked_fill", "where", "clamp", "copy", "new_zeros", "fill", "clamp_min"}
    todo, seen = [index], set[fx.Node]()
    while todo:
        node = todo.pop()
        if node.op == "placeholder":
            return not node.meta.get("fill")
        if node not in seen and ops.name(node) in through:
            seen.add(node)
            todo.extend(node.all_input_nodes if ops.name(node) != "where" else node.all_input_nodes[1:])
    return False
