"""The data of a program: a graph, the table of its tensors, its calling convention, and the edits that made it.

A `ProgramData` is a value: nothing in it changes once it is made. Rooms that rewrite copy the graph first (`copy_graph`).
The public `peftgraph.Program` adds the verbs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import fx

from peftgraph.ir.signature import Signature
from peftgraph.ir.table import Table


@dataclass(frozen=True)
class Change:
    """What folding an edit changes in the base.

    Attributes:
        parameter: the base tensor's name.
        window: which part of it, as printed; two edits with the same window change the same values.
        values: how many values that is.
        rank: the largest rank of the difference; None for a vector, or where no bound below full rank is known.
    """

    parameter: str
    window: str
    values: int
    rank: int | None


@dataclass(frozen=True)
class Edit:
    """One rewrite at one site.

    Attributes:
        application: index into the program's history.
        rule: index of the rule in its pass.
        site: id of the site.
        join: how the new computation entered: "add", "multiply", "replace", or "train" (no new computation).
        anchor: the base graph's node whose value was edited ("" for "train").
        level: the nesting of the edit at its anchor: 0 at a projection, 1 at a sublayer, 2 at a block.
        after: the node that carries the value from here on ("" for "train").
        nodes: every node the edit made.
        parameters: the names of the parameters it made or made trainable.
        moved: how many uses of the value were moved to `after`.
        changes: what folding it would change; empty when it cannot be folded.
    """

    application: int
    rule: int
    site: str
    join: str
    anchor: str
    level: int
    after: str
    nodes: tuple[str, ...]
    parameters: tuple[str, ...]
    moved: int
    changes: tuple[Change, ...] = ()


@dataclass(frozen=True)
class Applied:
    """One pass of a program's history: the pass and the name under which its parameters stand ("" for none)."""

    method: Any
    name: str = ""


@dataclass(frozen=True, eq=False)
class ProgramData:
    """A traced model and what passes made of it.

    Attributes:
        model: the class name of the traced model.
        graph: placeholders, one `get_attr` for each stored tensor that is used, aten calls, one flat output.
        table: the stored tensors.
        signature: the calling convention.
        example: the tensors of the traced call in placeholder order, kept for probes and export.
        history: the passes applied, in order.
        edits: what they did, in order.
        marked: whether literals that follow the parameters' dtype are known.
    """

    model: str
    graph: fx.Graph
    table: Table
    signature: Signature
    example: tuple[torch.Tensor, ...]
    history: tuple[Applied, ...] = ()
    edits: tuple[Edit, ...] = ()
    marked: bool = True
    notes: Mapping[str, str] = field(default_factory=dict)

    def evolve(self, **changes: Any) -> Self:
        """A program with some fields replaced."""
        return replace(self, **changes)

    def node(self, name: str) -> fx.Node:
        """The node of that name."""
        return find_node(self.graph, name)

    def chain(self, anchor: str) -> list[Edit]:
        """The edits at one anchor, innermost first."""
        return chain(self.edits, anchor)


def chain(edits: tuple[Edit, ...], anchor: str) -> list[Edit]:
    """The edits at `anchor`, innermost first: by level, then in order of application."""
    return sorted((edit for edit in edits if edit.anchor == anchor), key=lambda edit: edit.level)


def find_node(graph: fx.Graph, name: str) -> fx.Node:
    """The node called `name`; a missing one is a bug."""
    node = next((node for node in graph.nodes if node.name == name), None)
    assert node is not None, f"no node {name}"
    return node


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy with the same node names; metadata dictionaries are copied, the fake values in them are shared."""
    new = fx.Graph()
    mapped: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        mapped[node] = new.node_copy(node, lambda operand: mapped[operand])
        mapped[node].meta = dict(node.meta)
        assert mapped[node].name == node.name, f"{node.name} became {mapped[node].name}"
    return new


def calls(graph: fx.Graph) -> Iterator[fx.Node]:
    """The computing nodes, in order."""
    return (node for node in graph.nodes if node.op == "call_function")


def stored(graph: fx.Graph) -> Iterator[fx.Node]:
    """The nodes that read a stored tensor, in order."""
    return (node for node in graph.nodes if node.op == "get_attr")
