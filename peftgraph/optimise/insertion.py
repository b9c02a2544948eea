"""Inserts calls into graphs on symbolic sizes: values are inferred once for equal calls."""

from __future__ import annotations

from typing import Any

from torch import fx

from peftgraph.ir.shape_inference import ShapeInference, fake_mode_of


class Inserter:
    """Inserts calls into one graph, with their values under fake tensors."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.inference = ShapeInference(fake_mode_of(graph))

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Insert a call at the graph's insertion point."""
        node = self.graph.call_function(target, args, kwargs)
        node.meta["val"] = self.inference.value_of(node)
        return node
