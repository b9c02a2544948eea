"""An adapter of this library as updates of a checkpoint: its fold, decided on the meta device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from peftgraph.fold.plan import Plan, plan
from peftgraph.interop import adapter_files
from peftgraph.interop.shards.checkpoint import Checkpoint
from peftgraph.interop.shards.tensor_file import FLOATS
from peftgraph.interop.shards.updates import Read, check_stored, stored_key
from peftgraph.ir.program import ProgramData
from peftgraph.ir.table import Entry, Table
from peftgraph.sites import Sites

P = TypeVar("P", bound=ProgramData)


@dataclass(frozen=True, eq=False)
class Folded:
    """The fold of an adapter, by stored tensor.

    Attributes:
        plan: the fold, by parameter.
        parameters: the parameter of each stored tensor that changes.
        keys: the stored tensor of each parameter that is read.
    """

    plan: Plan
    parameters: Mapping[str, str]
    keys: Mapping[str, str]

    @property
    def changed(self) -> dict[str, tuple[str, ...]]:
        """The stored tensors that change, each with those that its new value is computed from."""
        changed = self.plan.changed
        return {key: tuple(self.keys[one] for one in changed[name]) for key, name in self.parameters.items()}

    def value(self, key: str, read: Read) -> Tensor:
        """The new value of a stored tensor, in its shape and dtype."""
        return self.plan.value(self.parameters[key], lambda name: read(self.keys[name]))


def folded_updates(
    program: P, sites: Sites, apply: Callable[..., P], directory: Path, checkpoint: Checkpoint, prefix: str
) -> Folded:
    """What folding an adapter changes in a checkpoint.

    Args:
        program: the model without passes, on the meta device.
        sites: its sites.
        apply: its verb that applies passes.
        directory: what `save_adapter` wrote.
        checkpoint: the model's weights.
        prefix: of the model within a model with a head.

    Raises:
        AdapterError: the adapter is damaged or fits another base.
        NoFold: something of it cannot be folded exactly.
        PeftGraphError: the checkpoint does not store a parameter that changes under its own name, or not in its shape
            or in floating numbers.
    """
    keys = {name: checkpoint.key(program.table.tied(name), prefix) for name in program.table}
    stored = {name: key for name, key in keys.items() if key is not None}
    tuned, trained = adapter_files.read(program, apply, directory, None)
    kinds = {name: FLOATS.get(checkpoint.slot(key).dtype) for name, key in stored.items()}
    decided = plan(tuned.evolve(table=_stored_as(tuned.table, kinds)), sites, trained)
    for name in dict.fromkeys(chain.from_iterable((one, *read) for one, read in decided.changed.items())):
        key = stored_key(checkpoint, program.table.tied(name), prefix)
        check_stored(checkpoint, key, decided.shape(name))
    return Folded(decided, {stored[name]: name for name in decided.changed}, stored)


def _stored_as(table: Table, kinds: Mapping[str, torch.dtype | None]) -> Table:
    """The table of a program on the meta device with the base's tensors in the dtypes of a checkpoint; ties stay."""
    made: dict[int, Tensor] = {}

    def converted(tensor: Tensor, dtype: torch.dtype) -> Tensor:
        return made.setdefault(id(tensor), tensor if tensor.dtype == dtype else tensor.detach().to(dtype))

    changes: dict[str, Entry] = {}
    for name, dtype in kinds.items():
        entry = table[name]
        if dtype is None:
            continue
        if entry.before is None:
            changes[name] = replace(entry, tensor=converted(entry.tensor, dtype))
        else:
            changes[name] = replace(entry, before=converted(entry.before, dtype))
    return table.with_(changes)
