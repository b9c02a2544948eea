"""Opens a checkpoint: the safetensors files of a model directory, one file or several with an index."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from peftgraph.errors import PeftGraphError
from peftgraph.interop.checked_files import read_object
from peftgraph.interop.checkpoints.tensor_file import FLOATS, Slot, TensorFile

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The stored tensors of a model.

    Attributes:
        folder: the model directory.
        files: its shards, in order.
        shards: the file of each tensor.
    """

    folder: Path
    files: tuple[TensorFile, ...]
    shards: Mapping[str, TensorFile]

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Read the headers of a model directory.

        Raises:
            PeftGraphError: there are no safetensors, a shard is missing or damaged, the shards do not contain what the
                index says, or the weights are quantised.
        """
        _refuse_quantised(folder)
        weight_map = {} if (folder / SINGLE).is_file() else _weight_map(folder)
        names = sorted(set(weight_map.values())) or [SINGLE]
        files = tuple(TensorFile.open(folder / name) for name in names)
        shards: dict[str, TensorFile] = {}
        for file in files:
            for tensor in file.slots:
                if tensor in shards:
                    raise PeftGraphError(f"{tensor} is stored twice: in {shards[tensor].path} and in {file.path}.")
                shards[tensor] = file
        for tensor, name in weight_map.items():
            if tensor not in shards or shards[tensor].path.name != name:
                raise PeftGraphError(f"{folder / INDEX} says that {name} holds {tensor}, which it does not.")
        return cls(folder, files, shards)

    @property
    def size(self) -> int:
        """The size of all shards, in bytes."""
        return sum(file.size for file in self.files)

    @property
    def dtype(self) -> torch.dtype | None:
        """The floating dtype of most of the stored bytes; None where nothing is stored in a floating dtype."""
        sizes: dict[str, int] = {}
        for slot in (slot for file in self.files for slot in file.slots.values() if slot.dtype in FLOATS):
            sizes[slot.dtype] = sizes.get(slot.dtype, 0) + slot.end - slot.begin
        return FLOATS[max(sizes, key=lambda kind: sizes[kind])] if sizes else None

    def slot(self, tensor: str) -> Slot:
        """Return the dtype, shape and position of a stored tensor."""
        return self.shards[tensor].slots[tensor]

    def read(self, tensor: str, lend: Callable[[int], Tensor] | None = None) -> Tensor:
        """Read one stored tensor, into memory of its own or memory that `lend` returns."""
        return self.shards[tensor].read(tensor, lend)

    def key(self, names: Iterable[str], prefix: str = "") -> str | None:
        """Return the name under which a parameter is stored; None where it is not.

        Args:
            names: of the parameter in the model; several where it is tied.
            prefix: the name of the bare model inside a model with a head. A bare model may be stored with it, and a
                model with a head without it.
        """
        for name in names:
            bare = name.removeprefix(f"{prefix}.") if prefix else name
            for candidate in (name, bare, f"{prefix}.{name}"):
                if candidate in self.shards:
                    return candidate
        return None


def _weight_map(folder: Path) -> dict[str, str]:
    """Read the index: tensor -> name of its file.

    Raises:
        PeftGraphError: it is missing or damaged.
    """
    path = folder / INDEX
    if not path.is_file():
        raise PeftGraphError(
            f"{folder} contains no weights: neither {SINGLE} nor {INDEX}. Pickled weights are not read."
        )
    weight_map = read_object(path, f"{path} is missing.", PeftGraphError).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(name, str) for name in weight_map.values())
    ):
        raise PeftGraphError(f"{path} has no weight_map from tensors to files.")
    for name in weight_map.values():
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise PeftGraphError(f"{path} names {name!r}, which is no safetensors file beside it.")
    return weight_map


def _refuse_quantised(folder: Path) -> None:
    """Check that the weights are not quantised.

    Raises:
        PeftGraphError: they are.
    """
    path = folder / "config.json"
    quantised = read_object(path, f"{path} is missing.", PeftGraphError).get("quantization_config")
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        raise PeftGraphError(
            f"{folder} holds quantised weights ({method or 'quantization_config in its config.json'}): a merged weight "
            "would have to be rounded again. Merge into the weights that were quantised."
        )
