"""The values of many adapters, along a first axis whose entry 0 is for rows of no adapter."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from peftgraph.errors import Conflict
from peftgraph.ir.shape_inference import fake_like
from peftgraph.ir.tensor_table import TensorEntry
from peftgraph.serving.by_row import CARRIED, RowWriter, Stack, mapped
from peftgraph.serving.neutrality import Fill
from peftgraph.serving.row_part import RowPart

aten = torch.ops.aten


@dataclass
class Stacks:
    """The stored values of a group of adapters.

    Attributes:
        parts: of the adapters.
        ids: their numbers, from 1.
        count: how many adapters there are in all.
        slots: how many of the group there is room for.
        label: the word that the names of the tensors contain.
        taken: names that are in use.
        entries: the stored tensors, by name.
    """

    parts: Sequence[RowPart]
    ids: Sequence[int]
    count: int
    slots: int
    label: str
    taken: Container[str]
    entries: dict[str, TensorEntry] = field(default_factory=dict[str, TensorEntry])
    index_name: str = ""
    _names: dict[tuple[int, bool], str] = field(default_factory=dict[tuple[int, bool], str])
    _nodes: dict[tuple[int, bool], fx.Node] = field(default_factory=dict[tuple[int, bool], fx.Node])

    @cached_property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shape of each value: the largest of all adapters."""
        shapes = [[tuple(value.shape) for value in values] for values in self._values]
        return [tuple(max(sizes) for sizes in zip(*each, strict=True)) for each in zip(*shapes, strict=True)]

    @cached_property
    def _values(self) -> list[list[Tensor]]:
        return [[part.value(node) for node in part.parameters] for part in self.parts]

    def fill(self, which: int) -> Fill:
        """Return what entry 0 of a value is."""
        part = self.parts[0]
        node = part.parameters[which]
        if part.is_base_value(node):
            return "base"
        return "one" if part.start_is_one(node) else "zero"

    def index(self, op: RowWriter) -> fx.Node:
        """Return the node of each row's entry in the stacks of the group; 0 where the row's adapter is of another."""
        table = torch.zeros(self.count + 1, dtype=torch.int64)
        for entry, number in enumerate(self.ids, 1):
            table[number] = entry
        self.index_name = self.free_name(f"peftgraph_{self.label}.index", ())
        device = op.ids.meta["val"].device
        self.entries[self.index_name] = TensorEntry(table.to(device), "buffer", added=True, keeps_dtype=True)
        read = op.insert("get_attr", self.index_name, (), {}, "index", fake_like(op.inference.mode, table.to(device)))
        return op.call(aten.index_select.default, read, 0, op.ids)

    def stack(self, op: RowWriter, which: int) -> Stack:
        """Return the values of one kind."""
        return Stack(lambda transposed: self._read(op, which, transposed), self.shapes[which])

    def _read(self, op: RowWriter, which: int, transposed: bool) -> fx.Node:
        key = (which, transposed)
        if key not in self._nodes:
            values = self.stored(which, transposed)
            node = self.parts[0].parameters[which]
            source = next(one for one in _get_attrs(node))
            stem, _, leaf = str(source.target).rpartition(".")
            leaf = leaf if source is node else f"{leaf}_{which}"
            name = self.free_name(f"{stem}.{self.label}.{leaf}{'_transposed' if transposed else ''}".lstrip("."), ())
            self._names[key] = name
            self.entries[name] = TensorEntry(values, "buffer", added=True)
            order, label = op.order, op.label
            op.order, op.label = (node.meta["order"][0],), f"{op.label}.{leaf}"
            self._nodes[key] = op.insert("get_attr", name, (), {}, "stack", fake_like(op.inference.mode, values))
            op.order, op.label = order, label
        return self._nodes[key]

    def stored(self, which: int, transposed: bool) -> Tensor:
        """Return the values of one kind as they are stored, (1 + slots, ...)."""
        rows = [self._empty_entry(which), *(self.padded(which, values[which]) for values in self._values)]
        whole = torch.stack(rows + [rows[0]] * (self.slots - len(self.parts)))
        return whole.transpose(-2, -1).contiguous() if transposed else whole

    def padded(self, which: int, value: Tensor) -> Tensor:
        """Return a value with zeros up to the largest shape.

        Raises:
            Conflict: it is larger.
        """
        missing = [size - own for size, own in zip(self.shapes[which], value.shape, strict=True)]
        if any(one < 0 for one in missing):
            raise Conflict(
                f"A parameter of shape {tuple(value.shape)} does not fit where there is room for {self.shapes[which]}."
            )
        return F.pad(value, [n for size in reversed(missing) for n in (0, size)]) if any(missing) else value

    def _empty_entry(self, which: int) -> Tensor:
        """Return what rows of no adapter read."""
        part, node = self.parts[0], self.parts[0].parameters[which]
        fill = self.fill(which)
        if fill == "base":
            return self.padded(which, part.base_value(node))
        like = self.padded(which, self._values[0][which])
        return torch.ones_like(like) if fill == "one" else torch.zeros_like(like)

    def free_name(self, wanted: str, more: Container[str]) -> str:
        """Return a name of a tensor that is not in use."""
        name, number = wanted, 1
        while name in self.taken or name in self.entries or name in more:
            number += 1
            name = f"{wanted}_{number}"
        return name

    @property
    def written(self) -> list[str]:
        """The names of the tensors that another adapter changes."""
        return [self.index_name, *self._names.values()]

    def has_shapes_of(self, part: RowPart) -> bool:
        """Tell whether the values of an adapter are as large as those here."""
        return [part.shape(node) for node in part.parameters] == self.shapes

    def write(self, entry: int, part: RowPart, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Put the values of another adapter into an entry of the stored tensors, by name.

        Returns:
            Larger tensors in the place of those that had too little room, by name.
        """
        larger: dict[str, Tensor] = {}
        with torch.no_grad():
            for (which, transposed), name in self._names.items():
                value = part.value(part.parameters[which])
                value = value.transpose(-2, -1) if transposed else value
                stored = tensors[name]
                more = [max(own - room, 0) for own, room in zip(value.shape, stored.shape[1:], strict=True)]
                if any(more):
                    stored = larger[name] = F.pad(stored, [n for size in reversed(more) for n in (0, size)])
                stored[entry].zero_()
                stored[entry][tuple(slice(0, size) for size in value.shape)] = value.to(stored.dtype)
        return larger


def _get_attrs(node: fx.Node) -> list[fx.Node]:
    found, todo = list[fx.Node](), [node]
    while todo:
        one = todo.pop()
        found += [one] if one.op == "get_attr" else []
        todo += one.all_input_nodes
    return found


@dataclass
class TrainedStacks(Stacks):
    """The values of a group of adapters, computed in the graph from each adapter's own parameters, which train.

    Attributes:
        names: of the adapters.
        parameters: the names of the parameters of each, by its name.
    """

    names: Sequence[str] = ()
    parameters: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    _copies: dict[tuple[int, fx.Node], fx.Node] = field(default_factory=dict[tuple[int, fx.Node], fx.Node])

    def _read(self, op: RowWriter, which: int, transposed: bool) -> fx.Node:
        if (which, False) not in self._nodes:
            order, label = op.order, op.label
            place = self.parts[0].parameters[which].meta["order"][0]
            op.order, op.label = (place,), f"{op.label}.{which}"
            values = [
                self._padded_node(op, which, self._copied(op, i, part.parameters[which]))
                for i, part in enumerate(self.parts)
            ]
            empty = self._empty_entry(which)
            name = self.free_name(f"peftgraph_{self.label}.empty_{which}", ())
            self.entries[name] = TensorEntry(empty, "buffer", persistent=False, added=True)
            first = op.insert("get_attr", name, (), {}, "empty", fake_like(op.inference.mode, empty))
            self._nodes[which, False] = op.call(aten.stack.default, [first, *values])
            op.order, op.label = order, label
        node = self._nodes[which, False]
        if not transposed:
            return node
        if (which, True) not in self._nodes:
            self._nodes[which, True] = op.call(aten.transpose.int, node, -2, -1)
        return self._nodes[which, True]

    def _copied(self, op: RowWriter, adapter: int, node: fx.Node) -> fx.Node:
        """Copy the computation of one adapter's value into the graph."""
        key = (adapter, node)
        if key not in self._copies:
            if node.op == "get_attr":
                self._copies[key] = self._parameter(op, adapter, str(node.target))
            else:
                args, kwargs = mapped(node, lambda one: self._copied(op, adapter, one))
                copy = op.insert("call_function", node.target, args, kwargs, "value")
                copy.meta |= {key: node.meta[key] for key in CARRIED if key in node.meta}
                self._copies[key] = copy
        return self._copies[key]

    def _parameter(self, op: RowWriter, adapter: int, target: str) -> fx.Node:
        """Read a tensor of one adapter, under a name with the adapter's own."""
        part, name = self.parts[adapter], self.names[adapter]
        entry = part.program.table[target]
        if target in part.base.table and part.base.table[target] is entry:
            return op.insert("get_attr", target, (), {}, "stored", fake_like(op.inference.mode, entry.tensor))
        stem, _, leaf = target.rpartition(".")
        full = self.free_name(f"{stem}.{name}.{leaf}".lstrip("."), ())
        self.entries[full] = replace(entry, added=True, base_tensor=None)
        if entry.trainable:
            self.parameters.setdefault(name, []).append(full)
        return op.insert("get_attr", full, (), {}, leaf, fake_like(op.inference.mode, entry.tensor))

    def _padded_node(self, op: RowWriter, which: int, node: fx.Node) -> fx.Node:
        own = [int(size) for size in node.meta["val"].shape]
        missing = [size - n for size, n in zip(self.shapes[which], own, strict=True)]
        if not any(missing):
            return node
        return op.call(aten.constant_pad_nd.default, node, [n for size in reversed(missing) for n in (0, size)])
