"""Where sites were found: what it takes to explain them later."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from peftgraph.ir.printer import Printer, assign_labels
from peftgraph.sites.assign.naming import sections, titles
from peftgraph.sites.site import Sites

if TYPE_CHECKING:
    from peftgraph.sites.assign.find import Finder


@dataclass(frozen=True, eq=False)
class Origin:
    """The graph of some sites. It holds no weights, and nothing of it points back to the sites.

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
    def finder(self) -> Finder:
        """The search, run once more when somebody asks: sites are found far more often than explained."""
        from peftgraph.sites.assign.find import Finder
        from peftgraph.sites.matchers.anatomy import Anatomy

        stored: dict[str, Any] = {str(n.target): n.meta["val"] for n in self.graph.nodes if n.op == "get_attr"}
        with torch.device("cpu"):
            finder = Finder(Anatomy(self.graph, stored | dict(self.integers)))
            finder.sites()
        return finder

    @cached_property
    def printer(self) -> Printer:
        """The printer of the graph's lines; a graph that nobody printed yet gets its names now."""
        if any(node.op == "call_function" and "label" not in node.meta for node in self.graph.nodes):
            found = Sites(self.finder.into.in_order())
            assign_labels(self.graph, titles(found), sections(found))
        return Printer(self.sizes)

    @cached_property
    def nodes(self) -> dict[str, fx.Node]:
        """Nodes by graph name."""
        return {node.name: node for node in self.graph.nodes}

    def label(self, name: str) -> str:
        """A node as the printer writes it: %0.attention.q, or @weight for what is stored."""
        return self.printer.operand(self.nodes[name])

    def say(self, text: str) -> str:
        """A text whose %graph_names are replaced by printed ones."""
        return re.sub(r"%(\w+)", lambda match: self.label(match[1]), text)

    def lines(self, names: Iterable[str]) -> list[str]:
        """The printed lines of some nodes, in graph order; inputs and stored tensors have none."""
        wanted = set(names)
        return [self.printer.line(n) for n in self.graph.nodes if n.name in wanted and n.op == "call_function"]
