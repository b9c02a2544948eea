"""Dead code: what reaches no output, and what must stay all the same."""

from __future__ import annotations

import torch
from torch import fx

aten = torch.ops.aten


def drop_dead(graph: fx.Graph) -> None:
    """Erases, in place, what reaches no output; inputs stay, and so does what writes in place."""
    for node in reversed(list(graph.nodes)):
        if node.op in ("placeholder", "output") or node.users or is_mutation(node):
            continue
        graph.erase_node(node)


def is_mutation(node: fx.Node) -> bool:
    """Whether a node writes into one of its operands."""
    return isinstance(node.target, torch._ops.OpOverload) and (
        node.target._schema.is_mutable or node.target is aten.batch_norm.default
    )
