"""What an adapter computes for each row of a batch, apart from what it computes from its parameters alone."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from peftgraph.errors import Conflict
from peftgraph.ir.dead_code import live_nodes
from peftgraph.ir.modes import DROPOUTS, by_mode
from peftgraph.ir.program import ProgramData
from peftgraph.ir.shape_inference import same_metadata
from peftgraph.serving.prompts import AdapterPrompt


@dataclass(frozen=True)
class Change:
    """Records that a node of the base reads a value of the adapter.

    Attributes:
        user: the node's name.
        operand: the position of the operand among all that it reads.
        value: the adapter's value, in the adapter's graph.
    """

    user: str
    operand: int
    value: fx.Node


@dataclass
class RowPart:
    """The part of an adapted program's graph that depends on rows of the batch.

    Attributes:
        program: the adapted program.
        base: what it was made from.
        ones: the names of its parameters that are one everywhere in a fresh adapter.
        adapter: the whole adapter, which computes its rows alone.
        prompt: its rows before the tokens, which are no part of `program`.
        rows: the nodes that compute with rows and the adapter's parameters, in order; some are the base's own, which
            read a parameter of the adapter.
        parameters: the values that depend on the adapter's parameters alone and that `rows` read.
        changes: where the base reads the adapter's values.
    """

    program: ProgramData
    base: ProgramData
    ones: frozenset[str] = frozenset()
    adapter: ProgramData | None = None
    prompt: AdapterPrompt | None = None
    rows: list[fx.Node] = field(default_factory=list[fx.Node])
    parameters: list[fx.Node] = field(default_factory=list[fx.Node])
    changes: list[Change] = field(default_factory=list[Change])

    @classmethod
    def of(cls, program: ProgramData, base: ProgramData, ones: frozenset[str] = frozenset()) -> RowPart:
        """Separate the rows' part of a program.

        Raises:
            Conflict: the program changes the sizes of the base's values.
        """
        part = cls(program, base, ones)
        part._separate()
        return part

    def _separate(self) -> None:
        own = {node.name: node for node in self.base.graph.nodes}
        from_rows, learned = set[fx.Node](), set[fx.Node]()
        for node in live_nodes(self.program.graph):
            if node.op == "placeholder" or not from_rows.isdisjoint(node.all_input_nodes):
                from_rows.add(node)
            if self._is_learned(node) or (not learned.isdisjoint(node.all_input_nodes) and node not in from_rows):
                learned.add(node)
            if node not in from_rows or node.op == "placeholder":
                continue
            read = [one for one in node.all_input_nodes if one in learned]
            if node.name not in own or read:
                self.rows.append(node)
                self.parameters += [one for one in read if one not in self.parameters]
        made = set(self.rows)
        for node in live_nodes(self.program.graph):
            if node.op != "placeholder" and node not in made and node in from_rows:
                self._compare(own[node.name], node, made)

    def _compare(self, before: fx.Node, after: fx.Node, made: set[fx.Node]) -> None:
        """Record the operands of a node of the base that are the adapter's."""
        literals = [str(map_arg((one.args, one.kwargs), lambda _: "")) for one in (before, after)]
        was, now = operands(before), operands(after)
        same_sizes = after.op == "output" or same_metadata(before.meta["val"], after.meta["val"])
        if literals[0] != literals[1] or len(was) != len(now) or not same_sizes:
            raise Conflict(
                f"{self.method} changes the sizes of the model's own values (%{after.meta.get('label', after.name)}), "
                "so its rows cannot be in one batch with others. Serve it alone: program.load_adapter(...).module()."
            )
        for i, (old, new) in enumerate(zip(was, now, strict=True)):
            if new in made:
                self.changes.append(Change(after.name, i, new))
            elif old.name != new.name and new.name not in self._base_names:
                raise Conflict(f"{self.method} replaces %{old.name} by a value that no row enters; it is not served.")

    @property
    def method(self) -> str:
        """The passes, for messages."""
        return "; ".join(str(applied.method) for applied in self.program.history)

    def _is_learned(self, node: fx.Node) -> bool:
        """Tell whether a node reads a tensor of the adapter: one that it made, or its copy of one of the base's."""
        if node.op != "get_attr":
            return False
        entry = self.program.table[str(node.target)]
        return entry.trainable or (entry.added and entry.kind == "parameter")

    @cached_property
    def key(self) -> Hashable:
        """What adapters have in common whose rows one graph can compute: the operators of `rows`, their literals, where
        they read the base, and where the base reads them."""
        place: dict[fx.Node, tuple[str, object]] = {node: ("row", i) for i, node in enumerate(self.rows)}
        place |= {
            node: ("parameter", (i, node.meta["val"].dim(), node.meta["val"].dtype))
            for i, node in enumerate(self.parameters)
        }

        def told(operand: fx.Node) -> Any:
            if operand in place:
                return place[operand]
            constant = operand.op == "get_attr" and operand.name not in self._base_names
            return ("constant", self._digest(operand)) if constant else ("base", operand.name)

        calls = [
            (node.name if node.name in self._base_names else "", str(node.target), repr(_mapped(node, told)))
            for node in self.rows
        ]
        changes = [(one.user, one.operand, place[one.value]) for one in self.changes]
        return repr((calls, changes))

    @cached_property
    def _base_names(self) -> set[str]:
        inputs = self.program.graph.find_nodes(op="placeholder")  # also those that passes added
        return {node.name for node in (*self.base.graph.nodes, *inputs)}

    def _digest(self, node: fx.Node) -> object:
        value = self.program.table[str(node.target)].tensor
        return tuple(value.shape), value.flatten().tolist() if value.device.type != "meta" else ()

    def is_base_value(self, node: fx.Node) -> bool:
        """Tell whether a value of `parameters` is one of the base's, with tensors of its own in the place of the
        base's."""
        return all(self._origin(one) is not None for one in _sources(node) if self._is_learned(one))

    def _origin(self, node: fx.Node) -> Tensor | None:
        """Return the base's tensor that a tensor of the adapter stands for; None if it stands for none."""
        return self._origins.get(str(node.target))

    @cached_property
    def _origins(self) -> Mapping[str, Tensor]:
        table = self.program.table
        found = {name: entry.base_tensor for name, entry in table.items() if entry.base_tensor is not None}
        copies = {name: stored for edit in self.program.edits for stored, name in edit.installed}
        return found | {name: self.base.table[stored].tensor for name, stored in copies.items()}

    def value(self, node: fx.Node, tensor_of: Callable[[fx.Node], Tensor] | None = None) -> Tensor:
        """Compute a value of `parameters` as in evaluation.

        Args:
            node: which one.
            tensor_of: what a stored tensor is; by default the program's.
        """
        known: dict[fx.Node, Any] = {}
        for one in _sources(node):
            if one.op == "get_attr":
                stored = self.program.table.value(str(one.target)) if tensor_of is None else tensor_of(one)
                known[one] = stored.detach()
            elif one.target is by_mode or one.target in DROPOUTS or one.meta.get("evaluates_to_first_operand"):
                known[one] = known[one.args[0]]  # pyright: ignore[reportArgumentType]
            else:
                assert not isinstance(one.target, str)
                with torch.no_grad():
                    known[one] = one.target(*map_arg(one.args, known.__getitem__), **map_arg(one.kwargs, known.get))
        return known[node]

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """Return the shape of a value of `parameters`."""
        return tuple(int(size) for size in node.meta["val"].shape)

    def base_value(self, node: fx.Node) -> Tensor:
        """Compute what a value of `parameters` is in the base, if it is one of the base's."""

        def tensor_of(one: fx.Node) -> Tensor:
            origin = self._origin(one)
            return self.program.table[str(one.target)].tensor if origin is None else origin

        return self.value(node, tensor_of)

    def start_is_one(self, node: fx.Node) -> bool:
        """Tell whether a value of `parameters` is a tensor of the adapter that is one everywhere in a fresh adapter."""
        return node.op == "get_attr" and str(node.target) in self.ones


def operands(node: fx.Node) -> list[fx.Node]:
    """Return all operands of a node, in order and with repetitions."""
    found: list[fx.Node] = []
    map_arg((node.args, node.kwargs), found.append)
    return found


def _mapped(node: fx.Node, told: Callable[[fx.Node], Any]) -> Any:
    """Return the arguments of a call with a description of each operand in its place."""
    descriptions = iter([told(one) for one in operands(node)])
    return map_arg((node.args, node.kwargs), lambda _: f"<{next(descriptions)}>")


def _sources(node: fx.Node) -> list[fx.Node]:
    """Return a node and all that it depends on, operands first."""
    order: dict[fx.Node, None] = {}
    todo = [node]
    while todo:
        one = todo[-1]
        waiting = [operand for operand in one.all_input_nodes if operand not in order]
        todo += waiting
        if not waiting:
            order[todo.pop()] = None
    return list(order)
