"""Computes what merging a peft adapter (LoRA, AdaLoRA, DoRA, (IA)3, rows of tokens) changes in a checkpoint, without a
trace.

The model on the meta device tells the class of every module, so that a transposed weight is known by its class and not
by its shape, and which weights are tied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from peftgraph.errors import AdapterError
from peftgraph.interop.checkpoints.checkpoint import Checkpoint
from peftgraph.interop.checkpoints.storage_layout import Piece, StorageLayout, StoredParameter
from peftgraph.interop.checkpoints.tensor_file import FLOATS, TensorFile
from peftgraph.interop.checkpoints.updates import Read, stored_as
from peftgraph.interop.parameter_names import (
    ADALORA_E,
    ADALORA_P,
    ADALORA_Q,
    DORA_MAGNITUDE,
    IA3_SCALE,
    LORA_A,
    LORA_B,
    TOKEN_ROWS,
)
from peftgraph.interop.peft.config import TENSORS, PeftConfig
from peftgraph.interop.peft.merge_algebra import TensorChange
from peftgraph.interop.peft.merge_config import read_merge
from peftgraph.interop.peft.tensors import LORA_BIAS, PREFIX, parse_tensor_name
from peftgraph.rewrite.weight_views import View

# Our names of an adapter's tensors -> the role of each in the change.
ROLES = {LORA_A: "A", LORA_B: "B", DORA_MAGNITUDE: "m", IA3_SCALE: "l", TOKEN_ROWS: "rows",
         ADALORA_Q: "A", ADALORA_E: "E", ADALORA_P: "B"}  # fmt: skip


@dataclass(frozen=True, eq=False)
class PeftUpdates:
    """The merge of a peft adapter, by stored tensor.

    Attributes:
        file: the adapter's tensors.
        dtypes: in which the parameters are stored.
        changes: the change of each parameter.
        stored: how each parameter is stored.
    """

    file: TensorFile
    dtypes: Mapping[str, torch.dtype]
    changes: Mapping[str, TensorChange]
    stored: Mapping[str, StoredParameter]

    @property
    def changed(self) -> dict[str, tuple[str, ...]]:
        """The stored tensors that change, each with the tensors that its new value is computed from."""
        return {
            key: () if self.changes[name].replaced else self.stored[name].names(piece.expert)
            for key, (name, piece) in self._pieces.items()
        }

    def report(self) -> str:
        """Say how many tensors change."""
        return f"changed   {len(self.changed)} tensors; every other tensor is the base's own"

    def value(self, key: str, read: Read) -> Tensor:
        """Compute the new value of a stored tensor, in its shape and dtype."""
        name, piece = self._pieces[key]
        change = self.changes[name]
        if change.replaced is None:
            start = self.stored[name].read(read, piece.expert)
        else:
            start = self.file.read(change.replaced).to(self.dtypes[name])
        return piece.slice(change.apply(start, self.file.read, piece.expert))

    @cached_property
    def _pieces(self) -> dict[str, tuple[str, Piece]]:
        """The parameter that each changed tensor belongs to, and its part of it."""
        return {piece.key: (name, piece) for name, stored in self.stored.items() for piece in stored.pieces}


def peft_updates(model: nn.Module, directory: Path, checkpoint: Checkpoint) -> PeftUpdates:
    """Compute what merging an adapter of peft changes in a checkpoint.

    Args:
        model: the base, on the meta device.
        directory: what peft's `save_pretrained` wrote.
        checkpoint: the base's weights.

    Raises:
        AdapterError: the adapter is damaged, fits another base, or cannot be merged exactly: it is of another method,
            or changes a weight that is tied to another.
        PeftGraphError: the checkpoint stores a weight that changes in a way that is not known, in another shape, or
            not in a floating dtype.
    """
    config = read_merge(directory)
    file = _tensors(directory)
    base, layout = _Base(model), StorageLayout.of(model, checkpoint)
    changes: dict[str, TensorChange] = {}
    stored: dict[str, StoredParameter] = {}
    for parameter, parts in _by_parameter(config, file, base).items():
        name = base.name(parameter, directory)
        changes[name] = _change(config, file, base, parameter, parts)
        stored[name] = stored_as(layout, base.tied(name), base.tensors[name].shape)
    for name in changes:
        _check_ties(file, base, name, changes)
    dtypes = {name: FLOATS[checkpoint.slot(one.pieces[0].key).dtype] for name, one in stored.items()}
    return PeftUpdates(file, dtypes, changes, stored)


@dataclass(frozen=True, eq=False)
class _Base:
    """The base model: its tensors by name, its ties, and its modules."""

    model: nn.Module
    tensors: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        buffers = dict(self.model.named_buffers(remove_duplicate=False))
        object.__setattr__(self, "tensors", {**parameters, **buffers})

    @property
    def prefix(self) -> str:
        """The name of the bare model inside a model with a head."""
        return getattr(self.model, "base_model_prefix", "")

    def find(self, parameter: str) -> str | None:
        """Return this model's name of an adapter's parameter; the adapter may belong to a model with a head, and this
        model have none."""
        bare = parameter.removeprefix(f"{self.prefix}.") if self.prefix else parameter
        names = (parameter, bare, f"{self.prefix}.{parameter}")
        return next((name for name in names if name in self.tensors), None)

    def find_module(self, path: str) -> str | None:
        """Return this model's path of an adapter's module; None where no such module has parameters of its own."""
        bare = path.removeprefix(f"{self.prefix}.") if self.prefix else path
        owners = {name.rpartition(".")[0] for name in self.tensors}
        return next((one for one in (path, bare, f"{self.prefix}.{path}") if one in owners), None)

    def name(self, parameter: str, directory: Path) -> str:
        """Return this model's name of an adapter's parameter.

        Raises:
            AdapterError: the model does not have it.
        """
        name = self.find(parameter)
        if name is None:
            raise AdapterError(f"{directory} changes {parameter}, which {type(self.model).__name__} does not have.")
        return name

    def tied(self, name: str) -> list[str]:
        """Return all names of the same tensor, this one first."""
        others = [other for other, tensor in self.tensors.items() if tensor is self.tensors[name] and other != name]
        return [name, *others]

    def view(self, name: str) -> View | None:
        """Return the view of a tensor as (out, in) matrix or (out,) vector; None where it is neither."""
        module = self.model.get_submodule(name.rpartition(".")[0])
        if self.tensors[name].dim() == 1:
            return View(name, vector=True)
        if self.tensors[name].dim() == 3 and not isinstance(module, nn.modules.conv._ConvNd):
            transposed = getattr(module, "is_transposed", False)
            return View(name, transposed=transposed, experts=len(self.tensors[name]))
        if isinstance(module, nn.Linear):
            return View(name)
        transposed = isinstance(module, nn.Embedding) or type(module).__name__ == "Conv1D"
        return View(name, transposed=True) if transposed and self.tensors[name].dim() == 2 else None


def _tensors(directory: Path) -> TensorFile:
    path = directory / TENSORS
    if not path.exists():
        raise AdapterError(f"{directory} contains no {TENSORS}. Pickled adapters are not read.")
    return TensorFile.open(path)


def _by_parameter(config: PeftConfig, file: TensorFile, base: _Base) -> dict[str, dict[str, str]]:
    """Return the adapter's tensors by the parameter that they change, under the adapter's name for it, and by role."""
    found: dict[str, dict[str, str]] = {}
    for key, slot in file.slots.items():
        parsed = parse_tensor_name(key.removeprefix(PREFIX))
        if isinstance(parsed, str):
            found.setdefault(parsed, {})["replaced"] = key
            continue
        path, wraps, leaf = parsed
        if leaf == LORA_BIAS:
            found.setdefault(f"{path}.bias", {})["d"] = key
            continue
        own = base.find_module(path)
        targets = [] if own is None else config.target_parameters(base.tensors, own)
        target = targets[-1 - wraps].removeprefix(f"{own}.") if wraps < len(targets) else "weight"
        found.setdefault(f"{path}.{target}", {})[ROLES[leaf]] = key
        if leaf == IA3_SCALE and slot.shape[-1] == 1 and base.find(f"{path}.bias") is not None:
            found.setdefault(f"{path}.bias", {})["l"] = key
    return found


def _change(
    config: PeftConfig, file: TensorFile, base: _Base, parameter: str, roles: Mapping[str, str]
) -> TensorChange:
    """Return the checked change of one parameter, under the adapter's name for it.

    Raises:
        AdapterError: the tensors do not fit the base, or the module cannot be merged by weights.
    """
    module, where = parameter.rpartition(".")[0], config.directory
    name = base.name(parameter, where)
    parts = {role: key for role, key in roles.items() if role != "replaced"}
    replaced = roles.get("replaced")
    full = base.tensors[name]
    if replaced is not None and file.slots[replaced].shape != tuple(full.shape):
        raise AdapterError(
            f"{where}: {parameter} has shape {file.slots[replaced].shape}, and {tuple(full.shape)} in the base."
        )
    if not parts:
        return TensorChange(View(name), replaced, {})
    view = base.view(name)
    if view is None:
        kind = type(base.model.get_submodule(name.rpartition(".")[0])).__name__
        raise AdapterError(f"{where}: {module} is a {kind}, which is not merged by weights here. Merge it with peft.")
    at = parameter if config.selects_parameter(parameter) else module
    shapes = {role: file.slots[key].shape for role, key in parts.items()}
    tokens = config.tokens(module) if "rows" in parts else ()
    wanted = {"rows": (len(tokens), *full.shape[1:])} if tokens else _shapes(config, at, view.shape(full), shapes)
    if shapes != wanted:
        raise AdapterError(f"{where}: the tensors of {parameter} have shapes {shapes}; {wanted} would fit the base.")
    if tokens and not 0 <= min(tokens) <= max(tokens) < len(full):
        raise AdapterError(f"{where}: a token of {module} is not in 0 to {len(full) - 1}.")
    scale = config.scale(at) if parts.keys() & {"A", "d"} else 1.0
    kept = tuple(config.triplets(module)) if "E" in parts else ()
    return TensorChange(view, replaced, parts, scale, tokens, kept)


def _shapes(
    config: PeftConfig, at: str, sizes: tuple[int, ...], have: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Return the shapes that an adapter's tensors must have at a weight (O, I) or (E, O, I), or a bias (O,)."""
    if "l" in have:
        return {"l": (1, sizes[1]) if len(sizes) == 2 and have["l"][0] == 1 != sizes[0] else (sizes[0], 1)}
    if len(sizes) == 1:
        return {"d": sizes}
    if config.method == "ADALORA":
        count = sum(config.triplets(at))
        return {"A": (count, sizes[1]), "E": (count, 1), "B": (sizes[0], count)}
    experts, features, inner = (1, *sizes)[-3:]
    rank = experts * config.rank(at)
    low: dict[str, tuple[int, ...]] = {"A": (rank, inner), "B": (features, rank)}
    return low | {"m": (features,)} if config.options.get("use_dora") else low


def _check_ties(file: TensorFile, base: _Base, name: str, changes: Mapping[str, TensorChange]) -> None:
    """Check that no change of a tied weight leaks into another one.

    The adapter may give all names of a tied weight the same new value, or change the rows of its first name, the
    embedding's.

    Raises:
        AdapterError: a change would leak.
    """
    others = base.tied(name)[1:]
    if others and _changes_rows_of_first(file, base, name, changes):
        return
    for other in others:
        pair = [changes[one] for one in (name, other) if one in changes]
        values = [file.read(change.replaced) for change in pair if change.replaced and not change.parts]
        if len(values) < 2 or not torch.equal(*values):
            raise AdapterError(
                f"{name} is tied to {other}, and the change would leak into it. Untie them before the merge."
            )


def _changes_rows_of_first(file: TensorFile, base: _Base, name: str, changes: Mapping[str, TensorChange]) -> bool:
    """Check whether a tied table changes only in the trained rows of its first name."""
    tied = set(base.tied(name))
    first = changes.get(next((one for one in base.tensors if one in tied), name))
    if first is None or not first.tokens:
        return False
    found = [changes[one] for one in tied if one in changes]
    rows = file.read(first.parts["rows"])
    return all(one.tokens == first.tokens and torch.equal(file.read(one.parts["rows"]), rows) for one in found)
