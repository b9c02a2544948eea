"""The steps of a fold: each takes one edit into the tensors of a table.

A whole program and a single parameter are folded by the same steps, so that they give the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from peftgraph.ir.table import Table
from peftgraph.rewrite.match import Match
from peftgraph.rewrite.rule import Params, Rule
from peftgraph.rewrite.views import View, accumulation_dtype, weight_view


@dataclass(frozen=True, eq=False)
class Write:
    """An edit's fold writes windows of stored tensors.

    Attributes:
        match: the site; its table is not read.
        rule: what made the edit.
        parameters: the edit's parameters, short name -> full name.
    """

    match: Match
    rule: Rule
    parameters: Mapping[str, str]

    def run(self, table: Table, precision: torch.dtype | None) -> tuple[Table, list[View]]:
        """The table with the new values, in the dtype that folding accumulates in, and the windows they are in."""
        assert not isinstance(self.rule.fold, str)
        view = weight_view(self.match.site)
        assert view is not None
        weight = table[view.parameter].tensor
        kind = {"device": weight.device, "dtype": precision or accumulation_dtype(weight.dtype)}
        params = Params({short: table[full].tensor.detach().to(**kind) for short, full in self.parameters.items()})
        written: list[View] = []
        for bound, value in self.rule.fold(replace(self.match, table=table, precision=precision), params).items():
            name = bound.view.parameter
            names = (name,) if self.rule.rows is None else table.tied(name)
            new = bound.view.put(table[name].tensor.detach(), value, value.dtype)
            table = table.with_({one: replace(table[one], tensor=new) for one in names})
            written += [replace(bound.view, parameter=one) for one in names]
        return table, written


@dataclass(frozen=True, eq=False)
class Settle:
    """Parameters that trained in place are the new weights; tied names stay tied.

    Attributes:
        names: the parameters.
    """

    names: Sequence[str]

    def run(self, table: Table, precision: torch.dtype | None) -> tuple[Table, list[View]]:
        """The table with the trained values, in the dtype that folding accumulates in, and what they cover."""
        values: dict[int, Tensor] = {}
        written: list[View] = []
        for name in self.names:
            entry = table[name]
            assert entry.before is not None
            dtype = precision or accumulation_dtype(entry.before.dtype)
            trained = entry.tensor.detach().to(device=entry.before.device, dtype=dtype, copy=True)
            value = values.setdefault(id(entry.tensor), trained)
            table = table.with_({name: replace(entry, tensor=value, trainable=False, before=None)})
            written.append(View(name, vector=value.dim() == 1))
        return table, written


Step = Write | Settle
