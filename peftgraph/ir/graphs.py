"""Small operations on fx graphs: look nodes up, copy a graph."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import fx
from torch.fx.node import map_arg


def find_node(graph: fx.Graph, name: str) -> fx.Node:
    """Return the node called `name`, which must exist."""
    node = next((node for node in graph.nodes if node.name == name), None)
    assert node is not None, f"no node {name}"
    return node


def copy_graph(graph: fx.Graph, order: Iterable[fx.Node] | None = None) -> fx.Graph:
    """Copy a graph, keeping node names; metadata dictionaries are copied, the fake values in them are shared.

    Args:
        graph: is unchanged.
        order: its nodes in the order that the copy has them in; its own if None.
    """
    new = fx.Graph()
    mapped: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes if order is None else order:
        copy = mapped[node] = new.create_node(node.op, node.target, name=node.name, type_expr=node.type)
        # Set afterwards, they are not searched for symbols, which takes fx most of the time of a copy.
        copy.args = map_arg(node.args, mapped.__getitem__)
        if node.kwargs:
            copy.kwargs = map_arg(node.kwargs, mapped.__getitem__)
        copy.meta = dict(node.meta)
        assert copy.name == node.name, f"{node.name} became {copy.name}"
    return new


def call_nodes(graph: fx.Graph) -> Iterator[fx.Node]:
    """Yield the nodes that compute, in order."""
    return (node for node in graph.nodes if node.op == "call_function")


def stored_tensor_nodes(graph: fx.Graph) -> Iterator[fx.Node]:
    """Yield the nodes that read a stored tensor, in order."""
    return (node for node in graph.nodes if node.op == "get_attr")
