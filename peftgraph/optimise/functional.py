"""Turns operations that write into a value into ones that return a new one."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from peftgraph.ir.dead_code import writes_in_place
from peftgraph.ir.modes import BATCH_STATISTICS

aten = torch.ops.aten


def make_functional(graph: fx.Graph) -> None:
    """Let every write into a value that the graph computes return a new value, in place.

    Raises:
        NotImplementedError: an input or a stored tensor is written to, or a view of the value is read elsewhere.
    """
    place = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if writes_in_place(node) and not _only_reads_statistics(node):
            node.target = _functional_form(node, place)


def _only_reads_statistics(node: fx.Node) -> bool:
    return node.target in BATCH_STATISTICS and len(node.args) > 5 and node.args[5] is False


def _functional_form(node: fx.Node, place: Mapping[fx.Node, int]) -> Any:
    assert isinstance(node.target, torch._ops.OpOverload)
    written: Any = node.args[0]
    name = node.target._schema.name.removeprefix("aten::")
    readers = [one for one in written.users if one is not node]
    alone = _is_fresh(written) and all(place[one] < place[node] and _is_fresh(one) for one in readers)
    if not alone or not name.endswith("_") or not hasattr(aten, name[:-1]):
        raise NotImplementedError(f"{node.name} writes into {written.name}, which is an input or read elsewhere")
    return getattr(getattr(aten, name[:-1]), node.target._overloadname)


def _is_fresh(node: fx.Node) -> bool:
    """Return True if a call returns memory of its own, or a number."""
    if node.target is operator.getitem:
        return isinstance(node.args[0], fx.Node) and _is_fresh(node.args[0])
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    if node.target is aten.sym_size.int:
        return True
    shares = (aten.reshape.default, aten.contiguous.default, aten.to.dtype, aten.to.device, aten.to.dtype_layout)
    return node.target not in shares and all(one.alias_info is None for one in node.target._schema.returns)
