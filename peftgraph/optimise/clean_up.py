"""Local rewrites of a joint graph that leave every bit as it is: what torch's derivatives compute without need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import SymInt, Tensor, fx
from torch.utils import _pytree as pytree

aten = torch.ops.aten
VIEWS = {aten.view.default, aten._unsafe_view.default}
Rewrite = Callable[[fx.Node], Any]


def clean_up(graph: fx.Graph) -> None:
    """Remove, in place, identities, transposes of transposes, views of views, and equal calculations."""
    rules = {
        aten.detach.default: _first,
        aten.alias.default: _first,
        aten.t.default: _transpose_of_transpose,
        aten.pow.Tensor_Scalar: _first_power,
        aten.div.Scalar: _scalar_before_expand,
        aten.mul.Tensor: _scalar_of_smaller_factor,
        aten.add.Tensor: _joined_slices,
        **dict.fromkeys(VIEWS, _view_of_view),
    }
    for node in list(graph.nodes):
        rule = rules.get(node.target) if node.op == "call_function" else None
        new = rule(node) if rule is not None else None
        if new is not None and new is not node:
            node.replace_all_uses_with(new)
            graph.erase_node(node)
    share_equal_nodes(graph)
    remove_unused(graph)


def remove_unused(graph: fx.Graph) -> None:
    """Erase, in place, calculations that nobody reads, except draws of random numbers."""
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users and not is_random(node):
            graph.erase_node(node)


def is_view(node: fx.Node) -> bool:
    """Return True if a node's value is memory of its operand."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    aliased = any(one.alias_info is not None for one in node.target._schema.returns)
    return aliased or node.target is aten._unsafe_view.default


def is_random(node: fx.Node) -> bool:
    """Return True if a node draws random numbers, so that it runs once and in order."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    if "attention" in node.target.name():  # in a joint graph they have no dropout
        return False
    return torch.Tag.nondeterministic_seeded in node.target.tags or node.target.name() == "peftgraph::draw_state"


def share_equal_nodes(graph: fx.Graph) -> None:
    """Compute, in place, what several equal calls compute once."""
    known: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or is_random(node):
            continue
        key = (node.target, argument_key(node.args), argument_key(tuple(sorted(node.kwargs.items()))))
        first = known.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)


def argument_key(value: Any) -> Any:
    """Return a hashable form of arguments, in which 1, 1.0 and True differ."""
    if isinstance(value, list | tuple):
        return tuple(argument_key(one) for one in value)
    return value if isinstance(value, fx.Node) else (type(value), repr(value))


def value_of(operand: Any) -> Any:
    """Return the fake value of a node, or a literal as it is."""
    return operand.meta["val"] if isinstance(operand, fx.Node) else operand


def same_sizes(a: Any, b: Any) -> bool:
    """Return True if two shapes are known to be equal."""
    return len(a) == len(b) and all(_expression(x) == _expression(y) for x, y in zip(a, b, strict=True))


def hint(size: Any) -> int:
    """Return the number that a size has in the call that was traced."""
    return int(size.node.hint) if isinstance(size, SymInt) else int(size)


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, SymInt) else size


def call(graph: fx.Graph, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """Insert a call whose value is inferred from those of its operands."""
    node = graph.call_function(target, args, kwargs)
    known, named = fx.map_arg((args, kwargs), lambda one: one.meta["val"])
    tensors = [one for one in pytree.tree_leaves((known, named)) if isinstance(one, Tensor)]
    mode = tensors[0].fake_mode if tensors else None  # pyright: ignore[reportAttributeAccessIssue]
    if mode is None:
        node.meta["val"] = target(*known, **named)
        return node
    with mode:
        node.meta["val"] = target(*known, **named)
    return node


def _first(node: fx.Node) -> Any:
    return node.args[0]


def _transpose_of_transpose(node: fx.Node) -> Any:
    source = node.args[0]
    return source.args[0] if isinstance(source, fx.Node) and source.target is aten.t.default else None


def _first_power(node: fx.Node) -> Any:
    return node.args[0] if node.args[1] in (1, 1.0) else None


def _view_of_view(node: fx.Node) -> Any:
    """Read the first value of a chain of views; a view in its own shape goes."""
    source: Any = node.args[0]
    while isinstance(source, fx.Node) and source.target in VIEWS:
        source = source.args[0]
    if same_sizes(value_of(source).shape, value_of(node).shape):
        return source
    if source is node.args[0]:
        return None
    with node.graph.inserting_before(node):
        new = node.graph.call_function(aten.view.default, (source, node.args[1]))
    new.meta = dict(node.meta)
    return new


def _scalar_before_expand(node: fx.Node) -> Any:
    """Divide by a number before a value is expanded, not after."""
    source, number = node.args
    if not isinstance(source, fx.Node) or source.target is not aten.expand.default or isinstance(number, fx.Node):
        return None
    with node.graph.inserting_before(node):
        small = call(node.graph, aten.div.Scalar, source.args[0], number)
        return call(node.graph, aten.expand.default, small, source.args[1])


def _scalar_of_smaller_factor(node: fx.Node) -> Any:
    """Turn (c x) * expand(a) into x * (c a) where c is a power of two, so that no bit changes."""
    for small, large in (node.args, node.args[::-1]):
        if not (isinstance(large, fx.Node) and large.target is aten.mul.Scalar and len(large.users) == 1):
            continue
        if not (isinstance(small, fx.Node) and small.target is aten.expand.default):
            continue
        factor: Any = large.args[1]
        if isinstance(factor, fx.Node) or factor not in (0.25, 0.5, 2.0, 4.0):
            continue
        with node.graph.inserting_before(node):
            scaled = call(node.graph, aten.mul.Scalar, small.args[0], factor)
            return call(node.graph, aten.mul.Tensor, large.args[0], scaled)
    return None


def _joined_slices(node: fx.Node) -> Any:
    """Turn the sum of two gradients of slices that together are the whole axis into their concatenation."""
    parts = [one for one in node.args[:2] if isinstance(one, fx.Node) and one.target is aten.slice_backward.default]
    if len(parts) != 2 or node.kwargs:
        return None
    ranges: list[Any] = sorted((tuple(one.args[2:]), i) for i, one in enumerate(parts) if _is_static(one.args[2:]))
    if len(ranges) != 2:
        return None
    ((axis, start, middle, step), low), ((other, again, end, stride), high) = ranges
    size = value_of(node).shape[axis]
    if not (axis == other and start == 0 and middle == again and step == stride == 1 and isinstance(size, int)):
        return None
    if end < size or middle >= size:
        return None
    with node.graph.inserting_before(node):
        return call(node.graph, aten.cat.default, [parts[low].args[0], parts[high].args[0]], axis)


def _is_static(arguments: Any) -> bool:
    return len(arguments) == 4 and all(type(one) is int for one in arguments)
