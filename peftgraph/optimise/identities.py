"""Removes operations that compute nothing: casts to the own dtype, views in the own shape, factors of 1."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from peftgraph.optimise.clean_up import remove_unused, same_sizes, share_equal_nodes, value_of

aten = torch.ops.aten
CASTS = {aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.to.other}
SHAPED = {aten.view.default, aten.reshape.default, aten.expand.default, aten._unsafe_view.default}
COPIES = {"copy", "memory_format"}  # arguments of a cast that make it more than one


def remove_identities(graph: fx.Graph) -> None:
    """Let every reader of an operation that changes nothing read its operand, in place; compute equal calls once."""
    for node in list(graph.nodes):
        if node.op == "call_function" and _is_identity(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    share_equal_nodes(graph)
    remove_unused(graph)


def _is_identity(node: fx.Node) -> bool:
    source = node.args[0] if node.args else None
    before, after = value_of(source), node.meta.get("val")
    if not isinstance(source, fx.Node) or not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return False
    if before.dtype != after.dtype or before.device != after.device:
        return False
    if node.target in CASTS:
        return not _copies(node) and before.layout == after.layout
    if node.target in SHAPED:
        return same_sizes(before.shape, after.shape)
    if node.target in (aten.detach.default, aten.alias.default):
        return True
    if source.op == "placeholder" or any(user.op == "output" for user in node.users):
        return False  # the caller may write into the result, which is no input's memory
    if node.target in (aten.mul.Tensor, aten.div.Tensor):
        return _is(node, 1) and same_sizes(before.shape, after.shape)
    if node.target in (aten.add.Tensor, aten.sub.Tensor):  # -0.0 + 0 is 0.0
        return _is(node, 0) and not node.kwargs and not after.is_floating_point() and not after.is_complex()
    return False


def _is(node: fx.Node, number: int) -> bool:
    operand: Any = node.args[1]
    return type(operand) in (int, float) and operand == number


def _copies(node: fx.Node) -> bool:
    assert isinstance(node.target, torch._ops.OpOverload)
    names = [one.name for one in node.target._schema.arguments]
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    return any(given.get(name) not in (None, False, torch.preserve_format) for name in COPIES)
