"""Removes dead code: nodes that reach no output and write nothing."""

from __future__ import annotations

import torch
from torch import fx

aten = torch.ops.aten
END_OF_AXIS = 2**63 - 1  # how the exporter writes an open end
WRITE_DISABLED = (
    "silent"  # the metadata of a node that no longer writes, such as a batch norm that only reads its statistics
)


def remove_dead_nodes(graph: fx.Graph, ignored: str = "") -> None:
    """Erase, in place, nodes that reach no output; inputs and nodes that write in place stay.

    Writes whose metadata has the key `ignored` are removed too.
    """
    needed = set(live_nodes(graph, ignored))
    for node in reversed(list(graph.nodes)):
        if node not in needed:
            graph.erase_node(node)


def bypass_full_slices(graph: fx.Graph) -> None:
    """Replace, in place, every slice that takes the whole axis by its operand."""
    for node in list(graph.nodes):
        if node.target is aten.slice.Tensor and tuple(node.args[2:]) == (0, END_OF_AXIS) and not node.kwargs:
            source = node.args[0]
            assert isinstance(source, fx.Node)
            node.replace_all_uses_with(source)
            graph.erase_node(node)


def live_nodes(graph: fx.Graph, ignored: str = "") -> list[fx.Node]:
    """Return inputs, the output, all that reaches it, and writes (except those marked `ignored`), in graph order."""
    needed: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if (
            node.op in ("placeholder", "output")
            or node in needed
            or (writes_in_place(node) and not node.meta.get(ignored))
        ):
            needed.add(node)
            needed.update(node.all_input_nodes)
    return [node for node in graph.nodes if node in needed]


def writes_in_place(node: fx.Node) -> bool:
    """Return True if a node writes into one of its operands, and the write was not disabled."""
    if node.meta.get(WRITE_DISABLED):
        return False
    return isinstance(node.target, torch._ops.OpOverload) and (
        node.target._schema.is_mutable or node.target in (aten.batch_norm.default, aten.instance_norm.default)
    )
