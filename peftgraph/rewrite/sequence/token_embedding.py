"""Which table lookup is that of tokens: not that of positions, nor of types."""

from __future__ import annotations

import torch

from peftgraph.rewrite.match import Match
from peftgraph.rewrite.sequence.token_inputs import find_token_inputs
from peftgraph.sites.dataflow import ops

aten = torch.ops.aten


def is_token_embedding(m: Match) -> bool:
    """Whether an embedding's numbers are tokens: they count no positions, and no longer table is looked up along them.

    Args:
        m: a match of an `embedding`.
    """
    if m.names[m.site.op].target is not aten.embedding.default:
        return False
    source = m.value("input")
    while source.op == "call_function" and ops.name(source) in ops.LAYOUT | ops.CAST:
        source = source.all_input_nodes[0]
    name = m.edits.base_value(source.name)
    given = next((node for node in m.inputs if node.name == name), None)
    if given is None or given.meta["val"].dim() < 2:
        return True
    along = find_token_inputs(m, m.now(given).meta["val"].shape[1])
    others = [rows for table, rows in along.tables if table not in along.positions]
    return name not in along.positions and m.shape[1] >= max(others, default=0)
