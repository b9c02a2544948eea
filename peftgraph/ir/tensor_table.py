"""The tensor table: every stored tensor of a program, by its dotted name.

Entries that hold the same tensor object are tied. Frozen entries share storage with the model that was traced;
trainable entries hold an `nn.Parameter`, shared by every program and module that descends from the pass that made
it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from peftgraph.ir.quantised import QuantisedWeight

Kind = Literal["parameter", "buffer", "constant"]


@dataclass(frozen=True)
class TensorEntry:
    """Describes one stored tensor.

    Attributes:
        tensor: the value; an `nn.Parameter` that requires grad when `trainable`.
        kind: "parameter", "buffer", or "constant" (a tensor literal of the model's code).
        persistent: whether it belongs to the state dict.
        trainable: whether training moves it.
        added: whether a pass made it; the base has no such name.
        base_tensor: the base's tensor, where a program has a copy of its own: a trainable one, or state.
        quantised: how the values are computed from codes, where these are stored in its place; `tensor` then has the
            shape and the dtype alone.
        keeps_dtype: whether it is never cast, as constants of codes.
        draw: draws the values again from a seed, where they are not saved.
    """

    tensor: Tensor
    kind: Kind
    persistent: bool = True
    trainable: bool = False
    added: bool = False
    base_tensor: Tensor | None = None
    quantised: QuantisedWeight | None = None
    keeps_dtype: bool = False
    draw: Callable[[], Tensor] | None = None

    @property
    def is_state(self) -> bool:
        """Return True for an adapted program's own copy of a buffer that training writes, such as running
        statistics."""
        return self.kind == "buffer" and self.base_tensor is not None


class TensorTable(Mapping[str, TensorEntry]):
    """Maps dotted names to `TensorEntry`; immutable and ordered."""

    def __init__(self, entries: Mapping[str, TensorEntry] | Iterable[tuple[str, TensorEntry]] = ()) -> None:
        self._entries = dict(entries)

    def __getitem__(self, name: str) -> TensorEntry:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def updated(self, changes: Mapping[str, TensorEntry]) -> TensorTable:
        """Return a table with `changes` applied; entries of the same name are replaced."""
        return TensorTable({**self._entries, **changes})

    def without(self, names: Iterable[str]) -> TensorTable:
        """Return a table without `names`."""
        gone = set(names)
        return TensorTable((name, entry) for name, entry in self._entries.items() if name not in gone)

    def with_tensor(self, name: str, tensor: Tensor) -> TensorTable:
        """Return a table in which `name` refers to `tensor`; other names keep theirs, so a tie to `name` is broken."""
        return self.updated({name: replace(self._entries[name], tensor=tensor)})

    def tensors(self) -> dict[str, Tensor]:
        """Return the plain tensors by name."""
        return {name: entry.tensor for name, entry in self._entries.items()}

    def value(self, name: str) -> Tensor:
        """Return the values under a name: those that codes stand for, where the tensor is quantised."""
        entry = self[name]
        if entry.quantised is None:
            return entry.tensor
        return entry.quantised.value({one: self[one].tensor for one in entry.quantised.tensors})

    @property
    def quantised(self) -> dict[str, QuantisedWeight]:
        """Return how quantised tensors are computed, by name."""
        return {name: entry.quantised for name, entry in self._entries.items() if entry.quantised is not None}

    def tied(self, name: str) -> tuple[str, ...]:
        """Return the names that share one tensor with `name`, itself included, in table order."""
        return tuple(self._names[id(self._entries[name].tensor)])

    def ties(self) -> tuple[tuple[str, ...], ...]:
        """Return the groups of two or more names that share one tensor."""
        return tuple(tuple(names) for names in self._names.values() if len(names) > 1)

    @cached_property
    def _names(self) -> dict[int, list[str]]:
        """Groups names by tensor identity."""
        groups: dict[int, list[str]] = {}
        for name, entry in self._entries.items():
            groups.setdefault(id(entry.tensor), []).append(name)
        return groups

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """Return the trainable parameters, by name."""
        return {
            name: entry.tensor
            for name, entry in self._entries.items()
            if entry.trainable and isinstance(entry.tensor, nn.Parameter)
        }

    @property
    def state(self) -> dict[str, Tensor]:
        """Return the program's own copies of buffers that training writes, by name."""
        return {name: entry.tensor for name, entry in self._entries.items() if entry.is_state}

    @property
    def dtype(self) -> torch.dtype:
        """Return the floating dtype of the base's parameters (the most frequent one, by number of values)."""
        sizes: dict[torch.dtype, int] = {}
        for entry in self._entries.values():
            if entry.tensor.is_floating_point() and entry.kind == "parameter" and not entry.added:
                sizes[entry.tensor.dtype] = sizes.get(entry.tensor.dtype, 0) + entry.tensor.numel()
        return max(sizes, key=lambda dtype: sizes[dtype], default=torch.get_default_dtype())

    @property
    def device(self) -> torch.device:
        """Return the device of the first base parameter (the default device when there is none)."""
        for entry in self._entries.values():
            if entry.kind == "parameter" and not entry.added and entry.quantised is None:
                return entry.tensor.device
        for entry in self._entries.values():
            if entry.quantised is not None:
                return self[entry.quantised.tensors[0]].tensor.device
        return torch.get_default_device()

    def hashes(self) -> dict[str, str]:
        """Return the sha256 of every tensor, by name (see `hash_tensor`)."""
        return {name: hash_tensor(entry.tensor) for name, entry in self._entries.items()}


def hash_tensor(tensor: Tensor) -> str:
    """Return the sha256 of a tensor's shape, dtype and (unless it is on the meta device) bytes."""
    digest = hashlib.sha256(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
    if tensor.device.type != "meta":
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
