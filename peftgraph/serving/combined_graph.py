"""Puts the rows' parts of many adapters into one graph of the base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from peftgraph.errors import Conflict
from peftgraph.ir.edits import Edit
from peftgraph.ir.shape_inference import ShapeInference, fake_like, same_metadata
from peftgraph.ir.tensor_table import TensorEntry
from peftgraph.serving.by_row import CARRIED, Chosen, RowWriter, Stack, mapped
from peftgraph.serving.neutrality import UNKNOWN, Known, itself, known_einsum, known_result
from peftgraph.serving.row_part import RowPart, operands
from peftgraph.serving.stacks import Stacks

aten = torch.ops.aten


@dataclass
class CombinedGraph:
    """A graph of the base while adapters' parts are put into it, a group of equal parts at a time.

    Attributes:
        graph: is changed in place.
        inference: of new values.
        ids: the node of each row's adapter, 0 for none.
        entries: the stored tensors that were added.
        resized: values that have an axis of rows where the base has one entry for all.
    """

    graph: fx.Graph
    inference: ShapeInference
    ids: fx.Node
    entries: dict[str, TensorEntry] = field(default_factory=dict[str, TensorEntry])
    resized: list[fx.Node] = field(default_factory=list[fx.Node])
    _labels: dict[str, int] = field(default_factory=dict[str, int])
    _current: dict[str, fx.Node] = field(default_factory=dict[str, fx.Node])
    _nodes: dict[str, fx.Node] = field(default_factory=dict[str, fx.Node])

    def __post_init__(self) -> None:
        self._nodes = {node.name: node for node in self.graph.nodes}

    def follow(self, edits: Sequence[Edit]) -> None:
        """Let adapters read what edits of the graph put in the place of the base's values."""
        for move in (move for edit in edits for move in edit.moves if move.anchor.reader is None):
            self._current[move.anchor.value] = self._nodes[move.after]

    def add(self, part: RowPart, stacks: Stacks, number: int) -> None:
        """Put in a group of adapters.

        Args:
            part: of one of them, whose operators those of all have.
            stacks: the values of all.
            number: of the group.

        Raises:
            Conflict: it is not known how rows with other parameters are computed together.
        """
        _Group(self, part, stacks, number).write()


@dataclass
class _Group:
    """One group of adapters whose rows are computed by the same calls."""

    whole: CombinedGraph
    part: RowPart
    stacks: Stacks
    number: int
    made: dict[fx.Node, fx.Node | Stack | Chosen] = field(default_factory=dict[fx.Node, Any])
    known: dict[fx.Node, Known] = field(default_factory=dict[fx.Node, Known])

    def write(self) -> None:
        whole = self.whole
        first = self._writer(whole.ids, (0,), f"adapters{self.number or ''}")
        index = self.stacks.index(first)
        self.writer = self._writer(index, (0,), first.label)
        self.member: fx.Node | None = None
        for i, node in enumerate(self.part.parameters):
            self.made[node] = self.stacks.stack(first, i)
            self.known[node] = Known(self.stacks.fill(i))
        for node in self.part.rows:
            self._write(node)
        self._redirect()
        whole.entries.update(self.stacks.entries)

    def _writer(self, ids: fx.Node, order: tuple[int, ...], label: str) -> RowWriter:
        whole = self.whole
        return RowWriter(whole.graph, whole.inference, ids, self.part.method, whole._labels, order, label)

    # calls

    def _write(self, node: fx.Node) -> None:
        """Write the calls for one of the adapter's."""
        op = self.writer
        args, kwargs = mapped(node, self._value)
        op.order = (*node.meta["order"][:1], self.number + 1)
        op.label = f"{node.meta.get('label', node.name)}.by_row" if self._is_base(node) else _stem(node)
        reads_stack = any(isinstance(one, Stack | Chosen) for one in _leaves((args, kwargs)))
        if reads_stack:
            result = op.by_row(node, args, kwargs)
        else:
            result = op.insert("call_function", node.target, args, kwargs, _hint(node))
        if isinstance(result, fx.Node):
            carried = {key: node.meta[key] for key in CARRIED if key in node.meta}
            result.meta |= {key: value for key, value in carried.items() if result.target is node.target}
        self.made[node] = result
        self.known[node] = self._known(node, args)

    def _check_shape(self, new: fx.Node, now: fx.Node) -> None:
        """Refuse a value of another shape than the one it replaces, but for an axis of rows in front."""
        mine, before = new.meta["val"], now.meta["val"]
        if same_metadata(mine, before, broadcast=True):
            return
        in_front = mine.dim() == before.dim() and tuple(map(str, mine.shape[1:])) == tuple(map(str, before.shape[1:]))
        if not in_front or mine.dtype != before.dtype or before.shape[0] != 1:
            raise Conflict(
                f"{self.part.method}: %{new.meta['label']} is {tuple(mine.shape)} {mine.dtype} and replaces "
                f"{tuple(before.shape)} {before.dtype}; its rows cannot be in one batch with others."
            )
        self.whole.resized.append(new)

    def _is_base(self, node: fx.Node) -> bool:
        return node.name in self.part._base_names

    def _value(self, node: fx.Node) -> Any:
        """Return what a value of the adapter's graph is here."""
        if node in self.made:
            return self.made[node]
        if self._is_base(node):
            return self.whole._current.get(node.name) or self.whole._nodes[node.name]
        if node.op == "get_attr":
            self.made[node] = self._constant(node)
        else:  # it depends on no row and no parameter of the adapter, such as a random number
            args, kwargs = mapped(node, self._value)
            self.writer.order, self.writer.label = (*node.meta["order"][:1], self.number + 1), _stem(node)
            self.made[node] = self.writer.insert("call_function", node.target, args, kwargs, _hint(node))
        return self.made[node]

    def _constant(self, node: fx.Node) -> fx.Node:
        """Read a constant of the adapter, such as an index, which all of the group share."""
        name = self.stacks.free_name(str(node.target), self.whole.entries)
        entry = self.part.program.table[str(node.target)]
        self.stacks.entries[name] = entry
        value = fake_like(self.whole.inference.mode, entry.tensor)
        return self.writer.insert("get_attr", name, (), {}, "constant", value)

    def _known(self, node: fx.Node, args: tuple[Any, ...]) -> Known:
        """Return what is known of a value on rows of no adapter."""
        of = [self.known.get(one, UNKNOWN) if isinstance(one, fx.Node) else UNKNOWN for one in node.args]
        if self._is_base(node):
            read = [self.known.get(one, UNKNOWN) for one in node.all_input_nodes if one in self.known]
            plain = all(one.fill == "base" or one.same is not None for one in read)
            return Known(same=self.whole._nodes[node.name]) if plain else UNKNOWN
        if node.target is aten.einsum.default:
            return known_einsum([self.known.get(one, UNKNOWN) for one in node.all_input_nodes])
        return known_result(node, args, of)

    # where the base reads them

    def _redirect(self) -> None:
        """Let the base read the adapters' values, which are the base's own on rows of no adapter of the group."""
        chosen: dict[tuple[fx.Node, fx.Node], fx.Node] = {}
        moved: dict[str, list[fx.Node]] = {}
        for change in self.part.changes:
            user = self.whole._nodes[change.user]
            now = operands(user)[change.operand]
            key = (change.value, now)
            if key not in chosen:
                chosen[key] = self._chosen(change.value, now)
            _replace_operand(user, change.operand, chosen[key])
            moved.setdefault(now.name, []).append(chosen[key])
        for name, values in moved.items():
            old = self.whole._nodes.get(name)
            if (
                old is not None
                and len(set(values)) == 1
                and all(one is values[0] or self._own(one) for one in old.users)
            ):
                self.whole._current[name] = values[0]

    def _own(self, node: fx.Node) -> bool:
        return node.name not in self.part._base_names

    def _chosen(self, value: fx.Node, now: fx.Node) -> fx.Node:
        """Return the adapters' value where a row has one of them, and the present one elsewhere."""
        new, op = self.made[value], self.writer
        assert isinstance(new, fx.Node)
        self._check_shape(new, now)
        if itself(None, self.known[value]) is now:
            return new
        op.order, op.label = (*value.meta["order"][:1], self.number + 1), _stem(value)
        if self.member is None:
            self.member = op.call(aten.gt.Scalar, op.ids, 0)
            self.member.meta["order"] = (0, self.number + 1, op.count)
        return op.choose(new, now, self.member)


def _stem(node: fx.Node) -> str:
    return str(node.meta.get("origin", node.meta.get("label", node.name)))


def _hint(node: fx.Node) -> str:
    return str(node.meta["label"]).removeprefix(f"{_stem(node)}.").partition("#")[0]


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, list | tuple):
        return [leaf for one in value for leaf in _leaves(one)]
    if isinstance(value, dict):
        return [leaf for one in value.values() for leaf in _leaves(one)]
    return [value]


def _replace_operand(user: fx.Node, position: int, new: fx.Node) -> None:
    """Replace one of a node's operands, in the order of `operands`."""
    count = iter(range(position + 1))

    def one(operand: fx.Node) -> fx.Node:
        return new if next(count, None) == position else operand

    user.args, user.kwargs = fx.map_arg((user.args, user.kwargs), one)
