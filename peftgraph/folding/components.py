"""Groups the steps of a fold by the tensors that they write, and computes the new values of one group at a time.

The steps of a group are computed together, in their order, from the stored values: in chunks where all of them fold by
chunk, so that nothing wide is as large as a tensor. Groups share no tensor, so any order of groups gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from peftgraph.folding.chunks import Chunk
from peftgraph.folding.steps import AcceptTrained, Step, WriteWindows, slice_table
from peftgraph.ir.program import ProgramData
from peftgraph.ir.tensor_table import TensorEntry, TensorTable
from peftgraph.rewrite.weight_views import View

Touched = Callable[[WriteWindows], Iterable[str]]


def stored_tensor(program: ProgramData, name: str) -> Tensor:
    """Return the tensor of the base under `name`."""
    entry = program.table[name]
    return entry.tensor if entry.base_tensor is None else entry.base_tensor


@dataclass(frozen=True)
class Piece:
    """The new values of one chunk.

    Attributes:
        chunk: which; None for whole tensors.
        values: by tensor.
        written: the windows that steps wrote into it, by tensor.
    """

    chunk: Chunk | None
    values: Mapping[str, Tensor]
    written: Mapping[str, Sequence[View]]


@dataclass(frozen=True, eq=False)
class Component:
    """Steps that read and write tensors which no other step of the fold writes.

    Attributes:
        steps: in order.
        table: the program's, before the fold.
    """

    steps: tuple[Step, ...]
    table: TensorTable

    @cached_property
    def _by_chunk(self) -> list[WriteWindows]:
        """The steps, if all of them fold one weight, and no other tensor but its bias, chunk by chunk; else none."""
        found = [step for step in self.steps if isinstance(step, WriteWindows) and step.folds_by_chunk(self.table)]
        views = [step.views.keys() for step in found]
        alike = all(own == views[0] for own in views) and len({step.joint for step in found}) == 1
        return found if len(found) == len(self.steps) and alike else []

    @property
    def views(self) -> Mapping[str, View]:
        """The windows of the first step, by tensor, where the steps fold by chunk."""
        return self._by_chunk[0].views if self._by_chunk else {}

    @cached_property
    def chunks(self) -> list[Chunk]:
        """The chunks that fold on their own; none where whole tensors fold."""
        return self._by_chunk[0].chunks(self.table) if self._by_chunk else []

    def names(self, name: str) -> tuple[str, ...]:
        """Return the names that take the new value which is computed for `name`."""
        joint = bool(self._by_chunk) and self._by_chunk[0].joint
        return self.table.tied(name) if joint else (name,)

    @cached_property
    def written_names(self) -> tuple[str, ...]:
        """The tensors that the steps may write, under all of their names."""
        own = (name for step in self.steps for name in _names(step))
        return tuple(dict.fromkeys(one for name in own for one in self.table.tied(name)))

    def pieces(self, precision: torch.dtype | None) -> Iterator[Piece]:
        """Compute the new values, in the dtype in which folding accumulates or in `precision`; yield them by chunk."""
        params = [step.parameter_values(self.table, precision) for step in self._by_chunk] if self.chunks else []
        for chunk in self.chunks:
            folded = slice_table(self.table, self.views, chunk)
            written: dict[str, list[View]] = {}
            for step, values in zip(self._by_chunk, params, strict=True):
                folded, found = step.compute(folded, values, precision, chunk)
                for name, view in found.items():
                    written.setdefault(name, []).append(view)
            yield Piece(chunk, {name: entry.tensor for name, entry in folded.items()}, written)
        if not self.chunks:
            table, written = self.whole(precision)
            yield Piece(None, {name: table[name].tensor for name in written}, written)

    def new_entries(
        self, dtype_of: Callable[[str], torch.dtype]
    ) -> tuple[dict[str, TensorEntry], dict[str, list[View]]]:
        """Return the new entries and the written windows, by tensor.

        Args:
            dtype_of: returns the stored dtype of a tensor, to which its new values are rounded once.
        """
        if not self.chunks:
            table, written = self.whole(None)
            rounded: dict[int, Tensor] = {}
            for name in written:
                tensor = table[name].tensor
                value = rounded.setdefault(id(tensor), tensor.to(dtype_of(name)))
                table = table.with_tensor(name, value)
            return {name: table[name] for name in written}, written
        new: dict[str, Tensor] = {}
        windows: dict[str, dict[View, None]] = {}
        for piece in self.pieces(None):
            assert piece.chunk is not None
            for name, view in self.views.items():
                written = piece.written.get(name, ())
                if name not in new and written:
                    new[name] = _room(self.table[name].tensor, dtype_of(name), piece.chunk is self.chunks[0])
                if name in new:
                    value = piece.values[name] if written else piece.chunk.slice(self.table[name].tensor, view)
                    piece.chunk.slice(new[name], view).copy_(value.detach())
                windows.setdefault(name, {}).update(dict.fromkeys(written))
        entries = {
            one: replace(self.table[one], tensor=value) for name, value in new.items() for one in self.names(name)
        }
        all_views = {
            one: [replace(view, parameter=one) for view in windows[name]] for name in new for one in self.names(name)
        }
        return entries, all_views

    def whole(self, precision: torch.dtype | None) -> tuple[TensorTable, dict[str, list[View]]]:
        """Run the steps one after the other on whole tensors."""
        table = self.table
        written: dict[str, list[View]] = {}
        for step in self.steps:
            table, views = step.run(table, precision)
            for view in views:
                written.setdefault(view.parameter, []).append(view)
        return table, written


def _room(old: Tensor, dtype: torch.dtype, empty: bool) -> Tensor:
    """Return memory for the new values of a tensor; with the old ones in it, unless it may be empty."""
    if empty:
        return torch.empty(old.shape, dtype=dtype, device=old.device)
    return old.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)


def components(program: ProgramData, steps: Sequence[Step], touched: Touched) -> list[Component]:
    """Return the groups of steps that share tensors, in the order of their first steps.

    Args:
        program: before the fold.
        steps: of the fold, in order.
        touched: returns the tensors that a step reads or writes; called where a step may read any.
    """
    table = program.table
    split = [one for step in steps for one in _by_tensor(step, table)]
    loose = {step: _group(table, _names(step)) for step in split}
    counts: dict[str, set[bool]] = {}
    for step, names in loose.items():
        for name in names:
            counts.setdefault(name, set()).add(isinstance(step, WriteWindows) and step.folds_by_chunk(table))
    for step, names in loose.items():
        mixed = any(len(counts[name]) > 1 for name in names)
        if isinstance(step, WriteWindows) and (mixed or not step.folds_by_chunk(table)):
            found = (name for name in touched(step) if not table[name].added)
            loose[step] = _group(table, found)
    return [Component(tuple(group), table) for group in _connected(loose)]


def _by_tensor(step: Step, table: TensorTable) -> list[Step]:
    """Split the acceptance of trained parameters by tensor."""
    if not isinstance(step, AcceptTrained):
        return [step]
    own: dict[int, list[str]] = {}
    for name in step.names:
        own.setdefault(id(table[name].tensor), []).append(name)
    return [AcceptTrained(tuple(names)) for names in own.values()]


def _names(step: Step) -> Iterable[str]:
    if isinstance(step, WriteWindows):
        return step.views
    return step.names if isinstance(step, AcceptTrained) else step.installed


def _group(table: TensorTable, names: Iterable[str]) -> set[str]:
    """Return one name for each tensor."""
    return {table.tied(name)[0] for name in names}


def _connected(names: Mapping[Step, set[str]]) -> list[list[Step]]:
    """Return the steps in groups whose names do not overlap."""
    groups: dict[int, list[Step]] = {}
    owner: dict[str, int] = {}
    for number, (step, own) in enumerate(names.items()):
        merged = sorted({owner[name] for name in own if name in owner})
        groups[number] = [one for old in merged for one in groups.pop(old)] + [step]
        for one in groups[number]:
            owner.update(dict.fromkeys(names[one], number))
    order = {step: number for number, step in enumerate(names)}
    return sorted(
        (sorted(group, key=order.__getitem__) for group in groups.values()), key=lambda group: order[group[0]]
    )
