"""Defines the steps of a fold: each folds one edit into the tensors of a table.

A whole program and a single parameter are folded by the same steps, so that they give the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from peftgraph.folding.chunks import Chunk, chunks_of
from peftgraph.ir.tensor_table import TensorEntry, TensorTable
from peftgraph.rewrite.match import Match
from peftgraph.rewrite.rule import Params, Rule
from peftgraph.rewrite.weight_views import View, accumulation_dtype, bias_view, scale_view, weight_view


@dataclass(frozen=True, eq=False)
class WriteWindows:
    """Writes the values of an edit's fold into windows of stored tensors.

    Attributes:
        match: the site; its table is not read.
        rule: of the edit.
        parameters: of the edit, short name -> full name.
        joint: whether the change is for all readers of the tensors, under all names, so that ties are kept.
    """

    match: Match
    rule: Rule
    parameters: Mapping[str, str]
    joint: bool = False

    @cached_property
    def views(self) -> dict[str, View]:
        """The windows that the fold may write, by parameter: the site's weight, the scale of a norm, and its bias."""
        found = (weight_view(self.match.site), scale_view(self.match.site), bias_view(self.match.site))
        return {view.parameter: view for view in found if view is not None}

    def run(self, table: TensorTable, precision: torch.dtype | None) -> tuple[TensorTable, list[View]]:
        """Return the table with the new values, in the dtype in which folding accumulates, and the written windows."""
        params, views = self.parameter_values(table, precision), self.views
        new: dict[str, Tensor] = {}
        written: dict[str, View] = {}
        chunks = self.chunks(table)
        for chunk in chunks:
            folded, found = self.compute(slice_table(table, views, chunk), params, precision, chunk)
            for name, view in found.items():
                if name not in written:
                    old, dtype = table[name].tensor.detach(), folded[name].tensor.dtype
                    new[name] = old.to(dtype, copy=True, memory_format=torch.contiguous_format)
                chunk.slice(new[name], view).copy_(folded[name].tensor)
            written |= found
        if not chunks:
            table, written = self.compute(table, params, precision)
        for name, value in new.items():
            names = table.tied(name) if self.joint else (name,)
            table = table.updated({one: replace(table[one], tensor=value) for one in names})
            written |= {one: replace(written[name], parameter=one) for one in names}
        return table, list(written.values())

    def touched_tensors(self, table: TensorTable) -> set[str]:
        """Return the stored tensors that the fold reads or writes, found by running it on shapes alone.

        Args:
            table: on the meta device.
        """
        shapes = RecordingTable(table)
        _, written = self.run(shapes, None)
        return shapes.read | {view.parameter for view in written}

    def parameter_values(self, table: TensorTable, precision: torch.dtype | None) -> dict[str, Tensor]:
        """Return the edit's parameters by short name, on the weight's device, in the dtype of accumulation."""
        weight = table[self._weight_view.parameter].tensor
        kind = {"device": weight.device, "dtype": precision or accumulation_dtype(weight.dtype)}
        return {short: table[full].tensor.detach().to(**kind) for short, full in self.parameters.items()}

    @property
    def _weight_view(self) -> View:
        """The window of the site's weight; of its bias where it has no weight."""
        first, *_ = self.views.values()
        return first

    def folds_by_chunk(self, table: TensorTable) -> bool:
        """Check whether chunks of the weight fold on their own."""
        weight, *rest = self.views.values()
        turned = weight.transposed and weight.experts is None and table[weight.parameter].tensor.dim() > 2
        if self.rule.row_axes is None or weight.axes is not None or turned:
            return False
        return all(view.window == weight.window for view in rest)  # else their features do not correspond

    def chunks(self, table: TensorTable) -> list[Chunk]:
        """Return the chunks of the weight that fold on their own; none where it folds as a whole, as on shapes."""
        weight = self._weight_view
        full = table[weight.parameter].tensor
        return chunks_of(full, weight) if full.device.type != "meta" and self.folds_by_chunk(table) else []

    def compute(
        self,
        table: TensorTable,
        params: Mapping[str, Tensor],
        precision: torch.dtype | None,
        chunk: Chunk | None = None,
    ) -> tuple[TensorTable, dict[str, View]]:
        """Compute the fold; return the table with the new values, and the written windows by parameter.

        Args:
            table: with the weight and the bias; with their chunks, where there is one.
            params: of the edit, whole.
            precision: the dtype to compute in, instead of the one that folding accumulates in.
            chunk: what to fold; None for the whole.
        """
        assert not isinstance(self.rule.fold, str)
        match = replace(self.match, table=table, precision=precision)
        if chunk is not None:
            site = chunk.narrow_site(match.site)
            if site is None:
                return table, {}
            axes, window = self._feature_axes(match), self._weight_view.window
            params = {short: chunk.slice_parameter(value, axes.get(short), window) for short, value in params.items()}
            match = replace(match, site=site)
        written: dict[str, View] = {}
        for bound, value in self.rule.fold(match, Params(params)).items():
            name = bound.view.parameter
            full = table[name].tensor.detach()
            stored = bound.view.stored(full, value) if chunk is not None else None  # the caller copies it
            new = bound.view.put(full, value, value.dtype) if stored is None else stored
            names = table.tied(name) if self.joint else (name,)
            table = table.updated({one: replace(table[one], tensor=new) for one in names})
            for one in names:
                written[one] = replace(bound.view, parameter=one) if chunk is None else self.views[one]
        return table, written

    def _feature_axes(self, match: Match) -> Mapping[str, int]:
        """Return the axes of output features of the edit's parameters."""
        assert self.rule.row_axes is not None
        return self.rule.row_axes(match)


class RecordingTable(TensorTable):
    """A table that records which entries are read."""

    def __init__(self, table: TensorTable) -> None:
        super().__init__(table)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> TensorEntry:
        self.read.add(name)
        return super().__getitem__(name)


def slice_table(table: TensorTable, views: Mapping[str, View], chunk: Chunk) -> TensorTable:
    """Return a table in which some stored tensors are reduced to a chunk, sharing their memory."""
    own = {name: (table[name], chunk.slice(table[name].tensor.detach(), view)) for name, view in views.items()}
    return TensorTable({name: replace(entry, tensor=tensor) for name, (entry, tensor) in own.items()})


@dataclass(frozen=True, eq=False)
class AcceptTrained:
    """Takes parameters that trained in place as the new weights; tied names stay tied.

    Attributes:
        names: the parameters.
    """

    names: Sequence[str]

    def run(self, table: TensorTable, precision: torch.dtype | None) -> tuple[TensorTable, list[View]]:
        """Return the table with the trained values, in the dtype of accumulation, and the written windows."""
        values: dict[int, Tensor] = {}
        written: list[View] = []
        for name in self.names:
            entry = table[name]
            assert entry.base_tensor is not None
            dtype = precision or accumulation_dtype(entry.base_tensor.dtype)
            trained = entry.tensor.detach().to(device=entry.base_tensor.device, dtype=dtype, copy=True)
            value = values.setdefault(id(entry.tensor), trained)
            table = table.updated({name: replace(entry, tensor=value, trainable=False, base_tensor=None)})
            written.append(View(name, vector=value.dim() == 1))
        return table, written


@dataclass(frozen=True, eq=False)
class InstallTrained:
    """Takes parameters that replaced stored tensors as their new values, under all of their names.

    Attributes:
        installed: stored tensor -> parameter, by name.
    """

    installed: Mapping[str, str]

    def run(self, table: TensorTable, precision: torch.dtype | None) -> tuple[TensorTable, list[View]]:
        """Return the table with the trained values, in the dtype of accumulation, and the written windows."""
        written: list[View] = []
        for name, parameter in self.installed.items():
            old = table[name].tensor
            dtype = precision or accumulation_dtype(old.dtype)
            value = table[parameter].tensor.detach().to(device=old.device, dtype=dtype, copy=True)
            names = table.tied(name)
            table = table.updated({one: replace(table[one], tensor=value) for one in names})
            written += [View(one, vector=value.dim() == 1) for one in names]
        return table, written


Step = WriteWindows | AcceptTrained | InstallTrained
