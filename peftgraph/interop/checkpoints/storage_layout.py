"""Finds how the parameters of a model are stored: each as one tensor, or in pieces that transformers assembles.

Checkpoints of mixtures of experts store every expert's matrices separately; the model has them as stacks, in which the
gate's rows are often concatenated with those of the branch that it gates. transformers' conversion mapping says where
each stored tensor goes when a model is loaded. Where it only renames, stacks and concatenates, stored values correspond
one to one to values of the model, and a change of a stack is a change of its pieces. Parameters that are converted in
another way are left out here, and cannot be changed.
Source: huggingface/transformers 5, conversion_mapping.py and core_model_loading.py (rename_source_key, MergeModulelist,
Concatenate).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftgraph.interop.checkpoints.checkpoint import Checkpoint
from peftgraph.interop.checkpoints.tensor_file import FLOATS


@dataclass(frozen=True)
class Piece:
    """A stored tensor, and the part of a parameter that it holds.

    Attributes:
        key: its name in the checkpoint.
        expert: its index in the stack; None where the parameter is no stack.
        axis: of one expert's matrix, or of the parameter, along which the pieces are concatenated.
        first, last: its range along that axis; `last` is None where it is the whole of it.
    """

    key: str
    expert: int | None = None
    axis: int = 0
    first: int = 0
    last: int | None = None

    def slice(self, full: Tensor) -> Tensor:
        """Return the piece's part of a parameter, in its memory."""
        own = full if self.expert is None else full[self.expert]
        return own if self.last is None else own.narrow(self.axis, self.first, self.last - self.first)


@dataclass(frozen=True)
class StoredParameter:
    """A parameter as it is stored.

    Attributes:
        pieces: of the parameter, by expert and in order.
        experts: the size of the stack; None where it is no stack.
    """

    pieces: tuple[Piece, ...]
    experts: int | None = None

    def names(self, expert: int | None = None) -> tuple[str, ...]:
        """Return the names of the stored tensors of the parameter, or of one expert of it."""
        return tuple(piece.key for piece in self._of(expert))

    def read(self, read: Callable[[str], Tensor], expert: int | None = None) -> Tensor:
        """Read the parameter; with an expert, its values for every expert of the stack, in the memory of one."""
        if self.experts is None:
            return _joined([read(piece.key) for piece in self.pieces], self.pieces[0].axis)
        if expert is not None:
            own = _joined([read(piece.key) for piece in self._of(expert)], self.pieces[0].axis)
            return own.unsqueeze(0).expand(self.experts, *own.shape)
        return torch.stack([self.read(read, one)[one] for one in range(self.experts)])

    def _of(self, expert: int | None) -> Sequence[Piece]:
        every = expert is None or self.experts is None
        return self.pieces if every else [piece for piece in self.pieces if piece.expert == expert]


def _joined(tensors: list[Tensor], axis: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, axis)


@dataclass(frozen=True)
class StorageLayout:
    """How the parameters of a model are stored in a checkpoint.

    Attributes:
        checkpoint: the stored tensors.
        prefix: the name of the bare model inside a model with a head.
        converted: the parameters that the model assembles from tensors with other names.
    """

    checkpoint: Checkpoint
    prefix: str
    converted: Mapping[str, StoredParameter]

    @classmethod
    def of(cls, model: nn.Module, checkpoint: Checkpoint) -> StorageLayout:
        """Find the layout of a checkpoint.

        Args:
            model: on the meta device. A model that is not transformers' stores each parameter under its own name.
            checkpoint: its weights.
        """
        prefix = getattr(model, "base_model_prefix", "")
        if not hasattr(model, "base_model_prefix"):
            return cls(checkpoint, prefix, {})
        return cls(checkpoint, prefix, _converted(model, checkpoint, prefix))

    def find(self, names: Iterable[str]) -> StoredParameter | None:
        """Return how a parameter is stored; None where it is not, or not value by value.

        Args:
            names: of the parameter in the model; several where it is tied.
        """
        names = list(names)
        key = self.checkpoint.key(names, self.prefix)
        if key is not None:
            return StoredParameter((Piece(key),))
        return next((self.converted[name] for name in names if name in self.converted), None)


def _converted(model: Any, checkpoint: Checkpoint, prefix: str) -> dict[str, StoredParameter]:
    """Return the parameters that transformers assembles, value by value, from stored tensors with other names."""
    from transformers import conversion_mapping
    from transformers import core_model_loading as loading

    transforms = conversion_mapping.get_model_conversion_mapping(model)
    renamings = [one for one in transforms if isinstance(one, loading.WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, loading.WeightConverter)]
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    state = model.state_dict()
    found: dict[str, dict[str | None, list[str]]] = {}
    for key in sorted(checkpoint.shards, key=loading.dot_natural_key):
        name, pattern = loading.rename_source_key(key, renamings, converters, prefix, state)
        if name in state and name != key:
            found.setdefault(name, {}).setdefault(pattern, []).append(key)
    converted: dict[str, StoredParameter] = {}
    for name, groups in found.items():
        pattern, *_ = groups
        stored = _stored(checkpoint, groups, None if pattern is None else by_pattern[pattern])
        if stored is not None and _fits(checkpoint, stored, tuple(state[name].shape)):
            converted[name] = stored
    return converted


def _stored(checkpoint: Checkpoint, groups: Mapping[str | None, list[str]], converter: Any) -> StoredParameter | None:
    """Return a parameter that is assembled from its tensors by pattern; None where transformers does more than
    assemble."""
    if converter is None:
        keys = groups[None]
        return StoredParameter((Piece(keys[0]),)) if len(groups) == len(keys) == 1 else None
    stacks, axis = _steps(converter.operations)
    lists = [groups.get(pattern, []) for pattern in converter.source_patterns]
    if axis is None or len(converter.target_patterns) > 1 or len({len(keys) for keys in lists}) > 1 or not lists[0]:
        return None
    if (len(lists[0]) > 1 and not stacks) or (len(lists) > 1 and len(converter.operations) == stacks):
        return None
    experts = range(len(lists[0])) if stacks else [None]
    rows = zip(experts, zip(*lists, strict=True), strict=True)
    pieces = [piece for expert, keys in rows for piece in _along(checkpoint, keys, expert, axis)]
    return StoredParameter(tuple(pieces), len(lists[0]) if stacks else None)


def _steps(operations: Sequence[Any]) -> tuple[bool, int | None]:
    """Return whether operations stack, and the axis along which they concatenate; None for it where they do more."""
    steps = [(type(one).__name__, getattr(one, "dim", None)) for one in operations]
    stacks = steps[0] == ("MergeModulelist", 0)
    rest = steps[stacks:]
    if not rest:
        return stacks, 0
    (name, axis), *more = rest
    plain = name == "Concatenate" and isinstance(axis, int) and axis >= stacks and not more
    return stacks, axis - stacks if plain and axis is not None else None


def _along(checkpoint: Checkpoint, keys: Sequence[str], expert: int | None, axis: int) -> list[Piece]:
    """Return pieces that are concatenated along an axis."""
    pieces: list[Piece] = []
    first = 0
    for key in keys:
        last = first + (*checkpoint.slot(key).shape, *(1,) * (axis + 1))[axis]
        pieces.append(Piece(key, expert, axis, first, last))
        first = last
    return pieces


def _fits(checkpoint: Checkpoint, stored: StoredParameter, shape: tuple[int, ...]) -> bool:
    """Check whether the pieces have one floating dtype and fill a parameter of that shape."""
    slots = {piece: checkpoint.slot(piece.key) for piece in stored.pieces}
    kinds = {slot.dtype for slot in slots.values()}
    if len(kinds) > 1 or not kinds <= FLOATS.keys():
        return False
    experts = [None] if stored.experts is None else range(stored.experts)
    own = shape if stored.experts is None else shape[1:]
    if stored.experts not in (None, shape[0]):
        return False
    for expert in experts:
        filled = 0
        for piece in (one for one in stored.pieces if one.expert == expert):
            size = slots[piece].shape
            if len(size) != len(own) or any(axis != piece.axis and size[axis] != own[axis] for axis in range(len(own))):
                return False
            filled += size[piece.axis]
        if filled != own[stored.pieces[0].axis]:
            return False
    return True
