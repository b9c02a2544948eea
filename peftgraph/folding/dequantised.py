"""Folding where weights are stored as codes: into the dequantised weights, and back to codes where that is wanted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from peftgraph.ir.edits import Move
from peftgraph.ir.program import AppliedPass, ProgramData
from peftgraph.ir.quantised_base import dequantiser_names, without_codes
from peftgraph.ir.tensor_table import TensorTable
from peftgraph.rewrite.apply import apply
from peftgraph.rewrite.remove import remove
from peftgraph.rewrite.weight_views import weight_view
from peftgraph.sites import Sites

P = TypeVar("P", bound=ProgramData)


def dequantised(program: P, sites: Sites) -> tuple[P, tuple[AppliedPass, ...]]:
    """Return the program with dequantised weights in the place of codes, and the passes that had made the codes."""
    values: dict[int, nn.Parameter] = {}
    table = program.table
    for name in table.quantised:
        entry = table[name]
        if id(entry.tensor) not in values:
            values[id(entry.tensor)] = nn.Parameter(table.value(name).contiguous(), requires_grad=False)
        table = table.updated({name: replace(entry, base_tensor=values[id(entry.tensor)])})
    which = sorted({edit.application for edit in program.edits if edit.quantised})
    passes = tuple(program.history[one] for one in which)
    result = program.evolve(table=table)
    for one in reversed(which):
        result = remove(result, sites, one)
    return _with_plain_base(result), passes


def _with_plain_base(program: P) -> P:
    """Return a program whose base reads dequantised weights where it reads codes of its own."""
    base = program.base
    assert base is not None
    if not base.table.quantised:
        return program
    names = dequantiser_names(program.graph)
    bare = base.evolve(graph=without_codes(base.graph), table=_plain(base.table, program.table))
    object.__setattr__(bare, "base", bare)
    edits = tuple(replace(edit, moves=tuple(_renamed(move, names) for move in edit.moves)) for edit in program.edits)
    table = _plain(program.table, program.table)
    return program.evolve(graph=without_codes(program.graph), table=table, base=bare, edits=edits)


def _renamed(move: Move, names: Mapping[str, str]) -> Move:
    """Return a move with its anchor at another node."""
    return replace(move, anchor=replace(move.anchor, value=names.get(move.anchor.value, move.anchor.value)))


def _plain(table: TensorTable, known: TensorTable) -> TensorTable:
    """Return a table with the values that `known` has for quantised weights, and without codes of the base."""
    gone = {tensor for how in table.quantised.values() for tensor in how.tensors}
    values = {}
    for name in table.quantised:
        value = known[name].base_tensor
        assert value is not None
        values[name] = replace(table[name], tensor=value, base_tensor=None, quantised=None)
    return table.updated(values).without(gone)


def requantised(program: P, sites: Sites, passes: Sequence[AppliedPass]) -> P:
    """Return a program with its weights stored as codes again, by the passes that had done so."""
    for applied in passes:
        program = apply(program, sites, (applied.method,), applied.dtype)
    return program


def quantisation_errors(program: ProgramData, sites: Sites) -> Mapping[str, float]:
    """Return how far the dequantised weights are from what was quantised, by site: the norm of the difference over the
    norm of the weight."""
    table, found = program.table, dict[str, float]()
    values: dict[str, Tensor] = {}
    for site in sites:
        view = weight_view(site)
        if view is None or site.role == "ffn.hidden" or table[view.parameter].quantised is None:
            continue
        before = table[view.parameter].base_tensor
        if before is None or before.device.type == "meta":
            continue
        if view.parameter not in values:
            values = {view.parameter: table.value(view.parameter)}
        wanted = view.get(before.detach()).double()
        norm = torch.linalg.vector_norm(wanted).clamp_min(1e-300)
        found[site.id] = float(torch.linalg.vector_norm(view.get(values[view.parameter]).double() - wanted) / norm)
    return found
