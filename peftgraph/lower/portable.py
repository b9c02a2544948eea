"""A graph in plain aten operations, for files that must run where only torch, or only an ONNX runtime, is installed."""

from __future__ import annotations

import torch
from torch import fx

from peftgraph.ir.program import copy_graph

aten = torch.ops.aten


def portable(graph: fx.Graph) -> fx.Graph:
    """A copy of `graph` in which experts' grouped products are spelled out: one product an expert, chosen by row."""
    new = copy_graph(graph)
    for node in list(new.nodes):
        if getattr(node.target, "_qualified_op_name", "") == "transformers::grouped_mm_fallback" or str(node.target).startswith("transformers.grouped_mm_fallback"):
            with new.inserting_before(node):
                node.replace_all_uses_with(_spelled_out(new, node))
            new.erase_node(node)
    return new


def _spelled_out(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """x (N, I), w (E, I, O), offsets (E,): row n times w[e] where offsets[e - 1] <= n < offsets[e]."""
    x, w, offsets = node.args[:3]
    assert isinstance(x, fx.Node) and isinstance(w, fx.Node) and isinstance(offsets, fx.Node)
    call = graph.call_function
    rows = call(aten.unsqueeze.default, (call(aten.arange.default, (call(aten.sym_size.int, (x, 0)),), {"device": x.meta["val"].device}), -1))
    total: fx.Node | None = None
    for expert in reversed(range(int(w.meta["val"].shape[0]))):
        product = call(aten.mm.default, (x, call(aten.select.int, (w, 0, expert))))
        if total is None:
            total = product
            continue
        inside = call(aten.lt.Tensor, (rows, call(aten.select.int, (offsets, 0, expert))))
        total = call(aten.where.self, (inside, product, total))
    assert total is not None
    return total
