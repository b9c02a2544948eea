"""Sorts a graph's nodes in a canonical order that does not depend on the order of rewrites."""

from __future__ import annotations

import heapq
from collections.abc import Container, Iterable, Iterator

from torch import Tensor, fx

from peftgraph.ir.graphs import copy_graph
from peftgraph.ir.shape_inference import ShapeInference, same_metadata


def in_canonical_order(graph: fx.Graph) -> fx.Graph:
    """Return a copy of the graph in canonical order: operands before users and, among valid orders, by `meta["order"]`.

    Base nodes carry their position in the traced graph and new ones the position they were inserted after. Removing
    a pass therefore restores the base's own order.
    """
    return copy_graph(graph, canonical_order(graph))


def canonically_ordered(graph: fx.Graph) -> fx.Graph:
    """Return the graph itself if its nodes are in canonical order; otherwise, a copy in which they are."""
    order = list(canonical_order(graph))
    return graph if order == list(graph.nodes) else copy_graph(graph, order)


def canonical_order(graph: fx.Graph) -> Iterator[fx.Node]:
    """Yield the nodes of a graph in canonical order."""
    position = {node: i for i, node in enumerate(graph.nodes)}  # among nodes of equal order, the first comes first
    waiting = {node: len(node.all_input_nodes) for node in position}
    ready = [(node.meta["order"], i, node) for node, i in position.items() if not waiting[node]]
    heapq.heapify(ready)
    while ready:
        *_, node = heapq.heappop(ready)
        yield node
        for user in node.users:
            waiting[user] -= 1
            if not waiting[user]:
                heapq.heappush(ready, (user.meta["order"], position[user], user))


def infer_changed_values(
    graph: fx.Graph, resized: Iterable[fx.Node], inference: ShapeInference, stretched: Container[fx.Node] = ()
) -> None:
    """Infer again, in place, the values that depend on nodes whose shape has changed.

    The nodes need not be in order. `stretched` are calls whose own arguments changed.
    """
    changed = set(resized)
    if not changed and not stretched:
        return
    for node in canonical_order(graph):
        concerned = node in stretched or not changed.isdisjoint(node.all_input_nodes)
        if node.op == "call_function" and concerned:
            value = inference.value_of(node)
            if not same_metadata(value, node.meta["val"]) or not isinstance(value, Tensor):
                node.meta["val"] = value
                changed.add(node)


def record_order(graph: fx.Graph) -> None:
    """Record the position of a base graph's nodes in their metadata, in place."""
    last = len(graph.nodes)
    for i, node in enumerate(graph.nodes):
        node.meta["order"] = (0 if node.op == "placeholder" else last if node.op == "output" else i,)
