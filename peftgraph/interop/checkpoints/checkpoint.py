"""A checkpoint: the safetensors files of a model directory, one or many with an index."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from peftgraph.errors import PeftGraphError
from peftgraph.interop.checkpoints.tensor_file import FLOATS, Slot, TensorFile
from peftgraph.interop.documents import read_object

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The stored tensors of a model.

    Attributes:
        folder: the model directory.
        files: its shards, in order.
        owners: the shard of each tensor.
    """

    folder: Path
    files: tuple[TensorFile, ...]
    owners: Mapping[str, TensorFile]

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Reads the headers of a model directory.

        Raises:
            PeftGraphError: there are no safetensors, a shard is missing or damaged, the shards do not hold what the
                index says, or the weights are quantised.
        """
        _refuse_quantised(folder)
        places = {} if (folder / SINGLE).is_file() else _weight_map(folder)
        names = sorted(set(places.values())) or [SINGLE]
        files = tuple(TensorFile.open(folder / name) for name in names)
        owners: dict[str, TensorFile] = {}
        for file in files:
            for tensor in file.slots:
                if tensor in owners:
                    raise PeftGraphError(f"{tensor} is stored twice: in {owners[tensor].path} and in {file.path}.")
                owners[tensor] = file
        for tensor, name in places.items():
            if tensor not in owners or owners[tensor].path.name != name:
                raise PeftGraphError(f"{folder / INDEX} says that {name} holds {tensor}, which it does not.")
        return cls(folder, files, owners)

    @property
    def size(self) -> int:
        """The length of all shards, in bytes."""
        return sum(file.size for file in self.files)

    @property
    def dtype(self) -> torch.dtype | None:
        """The floating dtype of most of the stored bytes; None when nothing is stored in floating numbers."""
        sizes: dict[str, int] = {}
        for slot in (slot for file in self.files for slot in file.slots.values() if slot.dtype in FLOATS):
            sizes[slot.dtype] = sizes.get(slot.dtype, 0) + slot.end - slot.begin
        return FLOATS[max(sizes, key=lambda kind: sizes[kind])] if sizes else None

    def slot(self, tensor: str) -> Slot:
        """The dtype, shape and place of a stored tensor."""
        return self.owners[tensor].slots[tensor]

    def read(self, tensor: str, lend: Callable[[int], Tensor] | None = None) -> Tensor:
        """One stored tensor, in memory of its own or that `lend` gives."""
        return self.owners[tensor].read(tensor, lend)

    def key(self, names: Iterable[str], prefix: str = "") -> str | None:
        """Under which name a parameter is stored; None where it is not.

        Args:
            names: the names of the parameter in the model: more than one where it is tied.
            prefix: of the model within a model with a head. A bare model may be stored with it, and a model with a
                head without it.
        """
        for name in names:
            bare = name.removeprefix(f"{prefix}.") if prefix else name
            for candidate in (name, bare, f"{prefix}.{name}"):
                if candidate in self.owners:
                    return candidate
        return None


def _weight_map(folder: Path) -> dict[str, str]:
    path = folder / INDEX
    if not path.is_file():
        raise PeftGraphError(f"{folder} holds no weights: neither {SINGLE} nor {INDEX}. Pickled weights are not read.")
    places = read_object(path, f"{path} is missing.", PeftGraphError).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise PeftGraphError(f"{path} has no weight_map from tensors to files.")
    for name in places.values():
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise PeftGraphError(f"{path} names {name!r}, which is no safetensors file beside it.")
    return places


def _refuse_quantised(folder: Path) -> None:
    path = folder / "config.json"
    quantised = read_object(path, f"{path} is missing.", PeftGraphError).get("quantization_config")
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        raise PeftGraphError(
            f"{folder} holds quantised weights ({method or 'quantization_config in its config.json'}): a merged weight "
            "would have to be rounded anew. Merge into the weights that were quantised."
        )
