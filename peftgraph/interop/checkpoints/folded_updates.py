"""Computes what folding an adapter of this library changes in a checkpoint; the fold is planned on the meta device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from peftgraph.folding.plan import FoldPlan, plan_fold
from peftgraph.interop import native
from peftgraph.interop.checkpoints.storage_layout import Piece, StorageLayout, StoredParameter
from peftgraph.interop.checkpoints.tensor_file import FLOATS
from peftgraph.interop.checkpoints.updates import Read, stored_as
from peftgraph.ir.program import ProgramData
from peftgraph.ir.tensor_table import TensorEntry, TensorTable
from peftgraph.sites import Sites

P = TypeVar("P", bound=ProgramData)


@dataclass(frozen=True, eq=False)
class FoldedUpdates:
    """The fold of an adapter, by stored tensor.

    Attributes:
        plan: the fold, by parameter.
        stored: how each parameter that is read or changed is stored.
    """

    plan: FoldPlan
    stored: Mapping[str, StoredParameter]

    @property
    def changed(self) -> dict[str, tuple[str, ...]]:
        """The stored tensors that change, each with the tensors that its new value is computed from."""
        reads = self.plan.changed
        return {
            key: tuple(chain.from_iterable(self.stored[one].names(self._expert(name, piece)) for one in reads[name]))
            for key, (name, piece) in self._pieces.items()
        }

    def report(self) -> str:
        """Return the proof of the fold, as text."""
        return str(self.plan.proof)

    def value(self, key: str, read: Read) -> Tensor:
        """Compute the new value of a stored tensor, in its shape and dtype."""
        name, piece = self._pieces[key]
        expert = self._expert(name, piece)
        return piece.slice(self.plan.value(name, lambda one: self.stored[one].read(read, expert), expert))

    @cached_property
    def _pieces(self) -> dict[str, tuple[str, Piece]]:
        """The parameter that each changed tensor belongs to, and its part of it."""
        return {piece.key: (name, piece) for name in self.plan.changed for piece in self.stored[name].pieces}

    def _expert(self, name: str, piece: Piece) -> int | None:
        """Return the expert that is computed for a piece; None where all are needed."""
        return piece.expert if self.plan.by_expert(name) else None


def folded_updates(
    program: P, sites: Sites, apply: Callable[..., P], directory: Path, layout: StorageLayout
) -> FoldedUpdates:
    """Compute what folding an adapter changes in a checkpoint.

    Args:
        program: the model without passes, on the meta device.
        sites: its sites.
        apply: its method that applies passes.
        directory: what `save_adapter` wrote.
        layout: of the model's weights.

    Raises:
        AdapterError: the adapter is damaged or fits another base.
        NoFold: something of it cannot be folded exactly.
        PeftGraphError: the checkpoint stores a parameter that changes in a way that is not known, in another shape, or
            not in a floating dtype.
    """
    stored = {name: layout.find(program.table.tied(name)) for name in program.table}
    kinds = {name: FLOATS.get(layout.checkpoint.slot(one.pieces[0].key).dtype) for name, one in stored.items() if one}
    tuned, trained = native.read(program, apply, directory, None)
    decided = plan_fold(tuned.evolve(table=_stored_as(tuned.table, kinds)), sites, trained)
    used = dict.fromkeys(chain.from_iterable((one, *read) for one, read in decided.changed.items()))
    found = {name: stored_as(layout, program.table.tied(name), decided.shape(name)) for name in used}
    return FoldedUpdates(decided, found)


def _stored_as(table: TensorTable, kinds: Mapping[str, torch.dtype | None]) -> TensorTable:
    """Return the table of a program on the meta device, with the dtypes of a checkpoint; ties are kept."""
    made: dict[int, Tensor] = {}

    def converted(tensor: Tensor, dtype: torch.dtype) -> Tensor:
        return made.setdefault(id(tensor), tensor if tensor.dtype == dtype else tensor.detach().to(dtype))

    changes: dict[str, TensorEntry] = {}
    for name, dtype in kinds.items():
        entry = table[name]
        if dtype is None:
            continue
        if entry.base_tensor is None:
            changes[name] = replace(entry, tensor=converted(entry.tensor, dtype))
        else:
            changes[name] = replace(entry, base_tensor=converted(entry.base_tensor, dtype))
    return table.updated(changes)
