"""The data of a program: a graph, the table of its tensors, its calling convention, and the edits that made it.

A `ProgramData` is a value: nothing in it changes once it is made. Rooms that rewrite copy the graph first
(`copy_graph`). The public `peftgraph.Program` adds the verbs.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import fx, nn
from torch.fx.node import map_arg

from peftgraph.errors import Conflict
from peftgraph.ir.checked import Checked
from peftgraph.ir.parameters import Table
from peftgraph.ir.shape_inference import constant_term
from peftgraph.ir.signature import Signature


@dataclass(frozen=True)
class Move:
    """A value that an edit replaced for its users.

    Attributes:
        anchor: the base graph's node whose value it is; `value@user` when only one user was given the new value.
        level: the nesting of the edit there: 0 at a projection, 1 at a sublayer, 2 at a block.
        after: the node that carries the value from here on.
        uses: how many uses were moved.
    """

    anchor: str
    level: int
    after: str
    uses: int


@dataclass(frozen=True)
class Stretch:
    """A size that is written as a number in a call, and that an edit made larger.

    Attributes:
        node: the call.
        argument: the position of the argument.
        index: the position in it, where it is a list; else None.
        by: how much was added.
    """

    node: str
    argument: int
    index: int | None
    by: int


@dataclass(frozen=True)
class Edit:
    """One rewrite at one site.

    Attributes:
        application: index into the program's history.
        rule: index of the rule in its pass.
        site: id of the site.
        moves: the values it replaced; none when it only makes parameters of the base trainable.
        nodes: every node it made, those of the delta first.
        parameters: the names of the parameters it made or made trainable.
        stretched: the numbers it made larger.
        joining: which of the nodes put the delta in its place.
        silenced: the writes of the model that it made to stop.
        installed: for each stored tensor that a parameter of the edit stands for, by name, that parameter.
    """

    application: int
    rule: int
    site: str
    moves: tuple[Move, ...]
    nodes: tuple[str, ...]
    parameters: tuple[str, ...]
    stretched: tuple[Stretch, ...] = ()
    joining: frozenset[str] = frozenset()
    silenced: tuple[str, ...] = ()
    installed: tuple[tuple[str, str], ...] = ()

    def within(self, names: Container[str]) -> Edit:
        """The edit without what it made of nodes that exist no longer, those of an edit that was taken out."""
        return replace(
            self,
            moves=tuple(
                one for one in self.moves if all(name in names for name in (*one.anchor.split("@"), one.after))
            ),
            nodes=tuple(name for name in self.nodes if name in names),
            stretched=tuple(one for one in self.stretched if one.node in names),
        )


@dataclass(frozen=True)
class Applied:
    """One pass of a program's history.

    Attributes:
        method: the pass.
        name: under which its parameters stand; "" for none.
        dtype: that its parameters were asked to be in; None for the default.
    """

    method: Any
    name: str = ""
    dtype: torch.dtype | None = None


@dataclass(frozen=True, eq=False)
class Surrounding:
    """The model around a traced submodule.

    Attributes:
        model: a frozen copy of the whole model; it shares the storage of the parameters.
        root: the dotted name of the submodule in it.
        assumed: arguments of the model that are False where a call does not give them.
    """

    model: nn.Module
    root: str
    assumed: frozenset[str] = frozenset()


@dataclass(frozen=True, eq=False)
class Host:
    """The library's class that a traced model is an instance of, for a module that stands in its place.

    Attributes:
        cls: the class.
        state: what an instance of it holds beside tensors and submodules, such as its configuration; copies.
    """

    cls: type[nn.Module]
    state: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Child:
    """What a submodule of the traced model is beside its tensors, for the module in its place.

    Attributes:
        cls: its class, where a module of that class can stand there without its own set-up; else `nn.Module`.
        state: its plain attributes, such as `stride` or `out_features`.
        absent: the parameters and buffers that it has a name for and no tensor, such as a `bias` of None.
    """

    cls: type[nn.Module]
    state: Mapping[str, Any]
    absent: tuple[str, ...]


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
        base: the traced program that all edits started from; None for that program itself.
        proof: the evidence of folding, on a folded program.
        host: the library's class of the model, if it is one of its classes.
        children: what the submodules are beside their tensors, by path, in the model's order.
        surrounding: the model around, when a submodule was traced; the table holds the tensors of the whole model.
        host: the library's class that the model is an instance of.
        checked: what was compared with the model; None: nothing.
    """

    model: str
    graph: fx.Graph
    table: Table
    signature: Signature
    example: tuple[torch.Tensor, ...]
    history: tuple[Applied, ...] = ()
    edits: tuple[Edit, ...] = ()
    marked: bool = True
    base: ProgramData | None = None
    proof: Any = None
    surrounding: Surrounding | None = None
    host: Host | None = None
    children: Mapping[str, Child] = field(default_factory=dict)
    checked: Checked | None = None

    def evolve(self, **changes: Any) -> Self:
        """A program with some fields replaced."""
        return replace(self, **changes)

    @property
    def examples(self) -> dict[str, torch.Tensor]:
        """What the model was traced with, by the names of the inputs in the graph."""
        return dict(zip((spec.name for spec in self.signature.inputs), self.example, strict=True))

    def grown(self) -> dict[str, int]:
        """By how much passes make sizes of the inputs larger on their way into the model, by the sizes' names; in a
        first call, where a graph continues earlier ones."""
        edits, more = Edits(self.edits), dict[str, int]()
        for spec in self.signature.inputs:
            line = edits.chain(spec.name)
            if line:
                given, now = (self.node(name).meta["val"].shape for name in (spec.name, line[-1].after))
                differences = {dim: constant_term(b - a) for dim, a, b in zip(spec.dims, given, now, strict=True)}
                more |= {dim: n for dim, n in differences.items() if n and isinstance(dim, str)}
        return more

    def require_one_adapter(self) -> None:
        """Refuses a program in which several named adapters have trained copies of one tensor: one must be chosen.

        Raises:
            Conflict: names the tensor and the adapters.
        """
        for name, several in contested(self.edits).items():
            names = [self.history[edit.application].name for edit in several]
            raise Conflict(
                f"{' and '.join(names)} each train a copy of {name}. Choose one of them: program.only({names[0]!r})."
            )

    def node(self, name: str) -> fx.Node:
        """The node of that name."""
        return find_node(self.graph, name)


class Edits:
    """The edits of a graph that is being rewritten, in order, with the moves of each anchor at hand."""

    def __init__(self, edits: Iterable[Edit] = ()) -> None:
        self._edits: dict[int, Edit] = {}  # by identity: taking one out costs nothing
        self._moves: dict[str, list[Move]] = {}
        self._anchors: dict[str, str] = {}
        self._owners: dict[Move, Edit] = {}
        self._into: dict[str, dict[Move, Edit]] = {}
        for edit in edits:
            self.append(edit)

    def __iter__(self) -> Iterator[Edit]:
        return iter(self._edits.values())

    def __len__(self) -> int:
        return len(self._edits)

    def __contains__(self, edit: object) -> bool:
        return id(edit) in self._edits

    def append(self, edit: Edit) -> None:
        """Puts an edit last."""
        self._edits[id(edit)] = edit
        for move in edit.moves:
            self._moves.setdefault(move.anchor, []).append(move)
            self._anchors[move.after] = move.anchor
            self._owners[move] = edit
            self._into.setdefault(move.anchor.partition("@")[2], {})[move] = edit

    def remove(self, edit: Edit) -> None:
        """Takes an edit out."""
        del self._edits[id(edit)]
        for move in edit.moves:
            self._moves[move.anchor].remove(move)
            self._anchors.pop(move.after, None)
            del self._owners[move], self._into[move.anchor.partition("@")[2]][move]

    def owner(self, move: Move) -> Edit:
        """The edit that a move belongs to."""
        return self._owners[move]

    def into(self, reader: str) -> Mapping[Move, Edit]:
        """The moves of what the node `reader` alone reads, each with its edit."""
        return self._into.get(reader, {})

    def chain(self, anchor: str) -> list[Move]:
        """The moves at `anchor`, innermost first: by level, then in order of application."""
        return sorted(self._moves.get(anchor, ()), key=lambda move: move.level)

    def under(self, move: Move) -> str:
        """The value that an edit replaced: the one that is there without it."""
        line = self.chain(move.anchor)
        position = line.index(move)
        return line[position - 1].after if position else move.anchor.partition("@")[0]

    def left(self, move: Move) -> str:
        """The value that is there once the edit of a move is taken out, whatever was edited after it."""
        value = self.under(move)
        own = self.owner(move)
        line = [one for one in self.chain(value) if self.owner(one) is not own] if "@" in move.anchor else []
        return line[-1].after if line else value

    def below(self, name: str) -> str:
        """The base's value in whose place the value called `name` stands: itself, if no edit put it there."""
        return self._anchors.get(name, name).partition("@")[0]


def contested(edits: Iterable[Edit]) -> dict[str, list[Edit]]:
    """The edits that put a parameter in the place of one and the same stored tensor, by its name: those of several
    named adapters, of which the last is read."""
    found: dict[str, list[Edit]] = {}
    for edit in edits:
        for name, _ in edit.installed:
            found.setdefault(name, []).append(edit)
    return {name: several for name, several in found.items() if len(several) > 1}


def find_node(graph: fx.Graph, name: str) -> fx.Node:
    """The node called `name`; a missing one is a bug."""
    node = next((node for node in graph.nodes if node.name == name), None)
    assert node is not None, f"no node {name}"
    return node


def copy_graph(graph: fx.Graph, order: Iterable[fx.Node] | None = None) -> fx.Graph:
    """A copy with the same node names; metadata dictionaries are copied, the fake values in them are shared.

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


def calls(graph: fx.Graph) -> Iterator[fx.Node]:
    """The computing nodes, in order."""
    return (node for node in graph.nodes if node.op == "call_function")


def stored(graph: fx.Graph) -> Iterator[fx.Node]:
    """The nodes that read a stored tensor, in order."""
    return (node for node in graph.nodes if node.op == "get_attr")
