"""Quantises a checkpoint shard by shard, in the memory of one tensor, and writes it as bitsandbytes stores modules.

The result is loaded by transformers with bitsandbytes installed. A shard is written as a stream: the sizes of codes and
constants follow from the shapes, so the header comes first, and then one tensor after the other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from peftgraph.errors import PeftGraphError
from peftgraph.interop.checkpoints.checkpoint import INDEX, Checkpoint
from peftgraph.interop.checkpoints.tensor_file import CHUNK, FLOATS, Slot, TensorFile
from peftgraph.ir.quantised import NESTED_BLOCK
from peftgraph.rewrite.quantiser import Codes, Quantiser
from peftgraph.utils.atomic_files import atomic_file

NAMES = {torch.uint8: "U8", torch.int8: "I8", torch.float32: "F32"}
OFFSET_DIGITS = 32  # room for a number in the description of a weight


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        weights: how many were quantised.
        before, after: the bytes of all shards.
    """

    weights: int
    before: int
    after: int


def quantise_shards(
    checkpoint: Checkpoint,
    names: Collection[str],
    quantiser: Quantiser,
    target: Path,
    wrote: Callable[[int], None] = lambda count: None,
) -> Written:
    """Write a checkpoint with some weights quantised.

    Args:
        checkpoint: what is read, one tensor at a time.
        names: the stored weights to quantise, matrices (O, I) of linear modules.
        quantiser: how.
        target: a folder that exists.
        wrote: called with numbers of written bytes.

    Raises:
        PeftGraphError: a weight is not stored, is no matrix of floating numbers, or the disk refuses.
    """
    for name in names:
        if name not in checkpoint.shards:
            raise PeftGraphError(f"{checkpoint.folder} stores no {name}.")
        slot = checkpoint.slot(name)
        if len(slot.shape) != 2 or slot.dtype not in FLOATS or not name.endswith(".weight"):
            raise PeftGraphError(f"{name} is {slot.dtype} {slot.shape}, and no weight of a linear module.")
    shards = [_Shard(file, [name for name in file.slots if name in names], quantiser) for file in checkpoint.files]
    for shard in shards:
        with atomic_file(target / shard.file.path.name) as temporary, temporary.open("wb") as handle:
            shard.write(handle, wrote)
    if (checkpoint.folder / INDEX).is_file():
        total = sum(stop - start for shard in shards for _, start, stop in shard.places)
        where = {name: shard.file.path.name for shard in shards for name, _, _ in shard.places}
        with atomic_file(target / INDEX) as temporary:
            temporary.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2))
    after = sum((target / shard.file.path.name).stat().st_size for shard in shards)
    return Written(len(names), checkpoint.size, after)


@dataclass(frozen=True)
class _Shard:
    """A shard that is to be written.

    Attributes:
        file: what is read.
        chosen: the weights that are quantised.
        quantiser: how.
    """

    file: TensorFile
    chosen: Collection[str]
    quantiser: Quantiser

    @cached_property
    def header(self) -> dict[str, tuple[str, tuple[int, ...], int]]:
        """Return the dtype, shape and number of bytes of what is written, by name, in order."""
        found: dict[str, tuple[str, tuple[int, ...], int]] = {}
        for name, slot in self.file.slots.items():
            if name not in self.chosen:
                found[name] = (slot.dtype, slot.shape, slot.end - slot.begin)
                continue
            shapes = self._codes(name, torch.empty(slot.shape, dtype=FLOATS[slot.dtype], device="meta"))
            for key, value in self._stored(name, slot, shapes):
                found[key] = (NAMES[value.dtype], tuple(value.shape), value.numel() * value.element_size())
        return found

    @property
    def places(self) -> Iterator[tuple[str, int, int]]:
        """Return the name and range of each tensor that is written."""
        start = 0
        for name, (_, _, size) in self.header.items():
            yield name, start, start + size
            start += size

    def write(self, handle: BinaryIO, wrote: Callable[[int], None]) -> None:
        """Write the header, and one tensor after the other."""
        entries = {
            name: {"dtype": self.header[name][0], "shape": self.header[name][1], "data_offsets": [start, stop]}
            for name, start, stop in self.places
        }
        head = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
        head += b" " * (-len(head) % 8)
        handle.write(len(head).to_bytes(8, "little") + head)
        for name, slot in self.file.slots.items():
            if name in self.chosen:
                made = self._codes(name, self.file.read(name))
                for _, value in self._stored(name, slot, made):
                    handle.write(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            else:
                self._copy(handle, slot)
            wrote(slot.end - slot.begin)

    def _codes(self, name: str, matrix: Tensor) -> Codes:
        return self.quantiser.quantise(matrix, matrix.dtype, name)

    def _copy(self, handle: BinaryIO, slot: Slot) -> None:
        with self.file.path.open("rb") as source:
            source.seek(slot.begin)
            left = slot.end - slot.begin
            while left:
                data = source.read(min(CHUNK, left))
                if not data:
                    raise PeftGraphError(f"{self.file.path} has changed: it is shorter than its header says.")
                handle.write(data)
                left -= len(data)

    def _stored(self, name: str, slot: Slot, made: Codes) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of a quantised weight, by the names that bitsandbytes' modules have for them."""
        yield name, made.own["codes"]
        if self.quantiser.format == "int8":
            path = name.removesuffix("weight")
            yield f"{path}SCB", made.own["absmax"]
            yield f"{path}weight_format", torch.zeros((), dtype=torch.uint8)
            return
        yield f"{name}.absmax", made.own["absmax"]
        yield f"{name}.quant_map", made.shared["table"]
        if self.quantiser.double:
            yield f"{name}.nested_absmax", made.own["nested_absmax"]
            yield f"{name}.nested_quant_map", made.shared["nested_table"]
        yield f"{name}.quant_state.bitsandbytes__{self.quantiser.format}", self._described(slot, made)

    def _described(self, slot: Slot, made: Codes) -> Tensor:
        """Return the description of a weight as bitsandbytes writes it, in JSON, with room for any offset."""
        told: dict[str, Any] = {
            "quant_type": self.quantiser.format,
            "blocksize": self.quantiser.block,
            "dtype": str(FLOATS[slot.dtype]).removeprefix("torch."),
            "shape": list(slot.shape),
        }
        if self.quantiser.double:
            offset = made.own["offset"]
            number = 0.0 if offset.device.type == "meta" else float(offset)
            told |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": number}
        text = json.dumps(told)
        if self.quantiser.double:
            text += " " * (OFFSET_DIGITS - len(json.dumps(told["nested_offset"])))
        return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def quantisation_config(quantiser: Quantiser, compute: str, skipped: Collection[str]) -> dict[str, Any]:
    """Return what the configuration of a model says of its quantised weights.

    Args:
        quantiser: that made them.
        compute: the dtype of products.
        skipped: the paths of linear modules that are not quantised.
    """
    four = quantiser.format != "int8"
    told: dict[str, Any] = {"quant_method": "bitsandbytes", "load_in_4bit": four, "load_in_8bit": not four}
    told["llm_int8_skip_modules"] = sorted(skipped)
    if four:
        told |= {
            "bnb_4bit_quant_type": quantiser.format,
            "bnb_4bit_use_double_quant": quantiser.double,
            "bnb_4bit_compute_dtype": compute,
            "bnb_4bit_quant_storage": "uint8",
        }
    return told


def copy_configuration(source: Path, target: Path, quantisation: dict[str, Any]) -> None:
    """Write the configuration of a model with what it says of its quantised weights.

    Raises:
        PeftGraphError: it is no JSON object.
    """
    try:
        document = json.loads((source / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PeftGraphError(f"{source / 'config.json'} cannot be read: {error}") from None
    with atomic_file(target / "config.json") as temporary:
        temporary.write_text(json.dumps(document | {"quantization_config": quantisation}, indent=2))
