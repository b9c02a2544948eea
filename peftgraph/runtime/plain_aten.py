"""A graph in plain aten operations, for files that run where only torch or an ONNX runtime is installed."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from peftgraph.ir.graphs import copy_graph
from peftgraph.ir.quantised import DEQUANTISERS, DequantisedProduct
from peftgraph.runtime.plain_codes import spell_dequantiser, spell_product

aten = torch.ops.aten


def in_plain_aten(graph: fx.Graph) -> fx.Graph:
    """Return a copy of `graph` with what other software does not know decomposed: weights that are computed from codes,
    and experts' grouped products, which become one product for each expert, selected by row."""
    new = copy_graph(graph)
    for node in list(new.nodes):
        if isinstance(node.target, DequantisedProduct):
            spell_product(new, node)
    for node in list(new.nodes):
        if node.target in DEQUANTISERS:
            spell_dequantiser(new, node)
    for node in list(new.nodes):
        if str(node.target).startswith(("transformers.grouped_mm_fallback", "aten._grouped_mm")):
            with new.inserting_before(node):
                total = _spelled_out(new, *node.args[:3])
            total.meta = dict(node.meta)
            node.replace_all_uses_with(total)
            new.erase_node(node)
    return new


def _spelled_out(graph: fx.Graph, x: Any, w: Any, offsets: Any) -> fx.Node:
    """Return x (N, I), w (E, I, O), offsets (E,): row n times w[e] where offsets[e - 1] <= n < offsets[e]."""
    call = graph.call_function
    numbers = call(aten.arange.default, (call(aten.sym_size.int, (x, 0)),), {"device": x.meta["val"].device})
    rows = call(aten.unsqueeze.default, (numbers, -1))
    last, *others = reversed(range(int(w.meta["val"].shape[0])))
    total = call(aten.mm.default, (x, call(aten.select.int, (w, 0, last))))
    for expert in others:
        product = call(aten.mm.default, (x, call(aten.select.int, (w, 0, expert))))
        inside = call(aten.lt.Tensor, (rows, call(aten.select.int, (offsets, 0, expert))))
        total = call(aten.where.self, (inside, product, total))
    return total
