"""The steps of a fold: each takes one edit into the tensors of a table.

A whole program and a single parameter are folded by the same steps, so that they give the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from peftgraph.folding.chunks import Part, parts_of
from peftgraph.ir.tensor_table import TensorEntry, TensorTable
from peftgraph.rewrite.match import Match
from peftgraph.rewrite.rule import Params, Rule
from peftgraph.rewrite.weight_views import View, accumulation_dtype, bias_view, weight_view


@dataclass(frozen=True, eq=False)
class Write:
    """An edit's fold writes windows of stored tensors.

    Attributes:
        match: the site; its table is not read.
        rule: what made the edit.
        parameters: the edit's parameters, short name -> full name.
        joint: whether it is for all who read the tensors, by any of their names, so that ties stay.
    """

    match: Match
    rule: Rule
    parameters: Mapping[str, str]
    joint: bool = False

    @cached_property
    def views(self) -> dict[str, View]:
        """The windows of what the fold may write, by parameter: the site's weight and its bias."""
        found = (weight_view(self.match.site), bias_view(self.match.site))
        return {view.parameter: view for view in found if view is not None}

    def run(self, table: TensorTable, precision: torch.dtype | None) -> tuple[TensorTable, list[View]]:
        """The table with the new values, in the dtype that folding accumulates in, and the windows they are in."""
        params, views = self.params(table, precision), self.views
        new: dict[str, Tensor] = {}
        written: dict[str, View] = {}
        parts = self.parts(table)
        for part in parts:
            folded, found = self.take(cut(table, views, part), params, precision, part)
            for name, view in found.items():
                if name not in written:
                    old, dtype = table[name].tensor.detach(), folded[name].tensor.dtype
                    new[name] = old.to(dtype, copy=True, memory_format=torch.contiguous_format)
                part.of(new[name], view).copy_(folded[name].tensor)
            written |= found
        if not parts:
            table, written = self.take(table, params, precision)
        for name, value in new.items():
            names = table.tied(name) if self.joint else (name,)
            table = table.updated({one: replace(table[one], tensor=value) for one in names})
            written |= {one: replace(written[name], parameter=one) for one in names}
        return table, list(written.values())

    def touched(self, table: TensorTable) -> set[str]:
        """The stored tensors that the fold reads or writes, found by taking the step on shapes alone.

        Args:
            table: on the meta device.
        """
        shapes = Recording(table)
        _, written = self.run(shapes, None)
        return shapes.read | {view.parameter for view in written}

    def params(self, table: TensorTable, precision: torch.dtype | None) -> dict[str, Tensor]:
        """The edit's parameters by short name, where the weight is, in the dtype that folding accumulates in."""
        weight = table[next(iter(self.views))].tensor
        kind = {"device": weight.device, "dtype": precision or accumulation_dtype(weight.dtype)}
        return {short: table[full].tensor.detach().to(**kind) for short, full in self.parameters.items()}

    def splits(self, table: TensorTable) -> bool:
        """Whether parts of the weight fold on their own."""
        weight, *rest = self.views.values()
        turned = weight.transposed and weight.experts is None and table[weight.parameter].tensor.dim() > 2
        if self.rule.row_axes is None or weight.axes is not None or turned:
            return False
        return all(view.window == weight.window for view in rest)  # else features of one are not those of the other

    def parts(self, table: TensorTable) -> list[Part]:
        """The parts of the weight that fold on their own; none where it folds as a whole, as on shapes alone."""
        weight = next(iter(self.views.values()))
        full = table[weight.parameter].tensor
        return parts_of(full, weight) if full.device.type != "meta" and self.splits(table) else []

    def take(
        self, table: TensorTable, params: Mapping[str, Tensor], precision: torch.dtype | None, part: Part | None = None
    ) -> tuple[TensorTable, dict[str, View]]:
        """The table with the new values, and the windows they are in, by parameter.

        Args:
            table: with the weight and the bias; those of the part, where there is one.
            params: of the edit, whole.
            precision: what to compute in instead of what folding accumulates in.
            part: what to fold; None for the whole.
        """
        assert not isinstance(self.rule.fold, str)
        match = replace(self.match, table=table, precision=precision)
        if part is not None:
            site = part.site(match.site)
            if site is None:
                return table, {}
            axes, window = self._rows(match), self.views[next(iter(self.views))].window
            params = {short: part.of_parameter(value, axes.get(short), window) for short, value in params.items()}
            match = replace(match, site=site)
        written: dict[str, View] = {}
        for bound, value in self.rule.fold(match, Params(params)).items():
            name = bound.view.parameter
            full = table[name].tensor.detach()
            stored = bound.view.stored(full, value) if part is not None else None  # copied from there in the end
            new = bound.view.put(full, value, value.dtype) if stored is None else stored
            names = table.tied(name) if self.joint else (name,)
            table = table.updated({one: replace(table[one], tensor=new) for one in names})
            for one in names:
                written[one] = replace(bound.view, parameter=one) if part is None else self.views[one]
        return table, written

    def _rows(self, match: Match) -> Mapping[str, int]:
        assert self.rule.row_axes is not None
        return self.rule.row_axes(match)


class Recording(TensorTable):
    """A table that remembers which entries were looked at."""

    def __init__(self, table: TensorTable) -> None:
        super().__init__(table)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> TensorEntry:
        self.read.add(name)
        return super().__getitem__(name)


def cut(table: TensorTable, views: Mapping[str, View], part: Part) -> TensorTable:
    """A table with a part of some stored tensors alone, in their memory."""
    own = {name: (table[name], part.of(table[name].tensor.detach(), view)) for name, view in views.items()}
    return TensorTable({name: replace(entry, tensor=tensor) for name, (entry, tensor) in own.items()})


@dataclass(frozen=True, eq=False)
class Settle:
    """Parameters that trained in place are the new weights; tied names stay tied.

    Attributes:
        names: the parameters.
    """

    names: Sequence[str]

    def run(self, table: TensorTable, precision: torch.dtype | None) -> tuple[TensorTable, list[View]]:
        """The table with the trained values, in the dtype that folding accumulates in, and what they cover."""
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
class Install:
    """Parameters that stood in the places of stored tensors are the new values, under all of their names.

    Attributes:
        installed: stored tensor -> parameter, by name.
    """

    installed: Mapping[str, str]

    def run(self, table: TensorTable, precision: torch.dtype | None) -> tuple[TensorTable, list[View]]:
        """The table with the trained values, in the dtype that folding accumulates in, and what they cover."""
        written: list[View] = []
        for name, parameter in self.installed.items():
            old = table[name].tensor
            dtype = precision or accumulation_dtype(old.dtype)
            value = table[parameter].tensor.detach().to(device=old.device, dtype=dtype, copy=True)
            names = table.tied(name)
            table = table.updated({one: replace(table[one], tensor=value) for one in names})
            written += [View(one, vector=value.dim() == 1) for one in names]
        return table, written


Step = Write | Settle | Install
