"""The graph that sites were found in: what it takes to explain them later."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx

from peftgraph.ir.printer import Printer, assign_labels
from peftgraph.sites.assign.naming import sections, titles
from peftgraph.sites.assign.structure import Structure
from peftgraph.sites.search import Search


@dataclass(frozen=True, eq=False)
class Origin:
    """The graph of some sites. It contains no weights, and nothing of it points back to the sites.

    Attributes:
        graph: the canonical graph that was searched.
        integers: its stored tensors that are not floating; detection reads positions and indices in them.
        sizes: symbol of a symbolic size -> its printed name.
    """

    graph: fx.Graph
    integers: Mapping[str, torch.Tensor]
    sizes: Mapping[str, str]

    @classmethod
    def of(cls, graph: fx.Graph, tensors: Mapping[str, torch.Tensor], sizes: Mapping[str, str]) -> Origin:
        integers = {name: t for name, t in tensors.items() if not (t.is_floating_point() or t.is_complex())}
        return cls(graph, integers, sizes)

    @cached_property
    def structure(self) -> Structure:
        """What the graph is made of: searched once more when somebody asks, since sites are found far more often than
        explained."""
        return self._search.structure

    @cached_property
    def _search(self) -> Search:
        stored: dict[str, Any] = {str(n.target): n.meta["val"] for n in self.graph.nodes if n.op == "get_attr"}
        return Search(self.graph, stored | dict(self.integers))

    @cached_property
    def printer(self) -> Printer:
        """The printer of the graph's lines; a graph that nobody printed yet gets its names now."""
        if any(node.op == "call_function" and "label" not in node.meta for node in self.graph.nodes):
            found = self._search.sites
            assign_labels(self.graph, titles(found), sections(found))
        return Printer(self.sizes)

    @cached_property
    def nodes(self) -> dict[str, fx.Node]:
        """Nodes by graph name."""
        return {node.name: node for node in self.graph.nodes}

    def label(self, name: str) -> str:
        """Return a node as the printer writes it: %0.attention.q, or @weight for what is stored."""
        return self.printer.operand(self.nodes[name])

    def say(self, text: str) -> str:
        """Return a text whose %graph_names are replaced by printed ones."""
        return re.sub(r"%(\w+)", lambda match: self.label(match[1]), text)

    def lines(self, names: Iterable[str]) -> list[str]:
        """Return the printed lines of some nodes, in graph order; inputs and stored tensors have none."""
        wanted = set(names)
        return [self.printer.line(n) for n in self.graph.nodes if n.name in wanted and n.op == "call_function"]
