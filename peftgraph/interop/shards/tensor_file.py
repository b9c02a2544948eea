"""One safetensors file, read tensor by tensor and written in a stream.

The safetensors library checks a file but cannot write one in a stream: `save_file` takes all tensors at once. What it
reads is mapped memory, which counts as the process's own for as long as the file is open. So tensors are read from the
places that the header names, and a merged file is the header of its source, byte for byte, followed by the data in the
same order: shapes and dtypes do not change.

The format: 8 bytes with the length of the header, little-endian; the header, a JSON object from tensor to dtype, shape
and place; the data. Source: the safetensors README, "Format".
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from peftgraph.errors import PeftGraphError

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
New = Callable[[], Tensor]
CHUNK = 8 << 20  # bytes copied at once


@dataclass(frozen=True)
class Slot:
    """Where a tensor lies.

    Attributes:
        dtype: as the format spells it, such as BF16.
        shape: its sizes.
        begin, end: the first byte of it in the file, and the first after it.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, eq=False)
class TensorFile:
    """A checked safetensors file.

    Attributes:
        path: the file.
        head: its bytes before the data.
        slots: its tensors, in the order of their data.
        size: its length in bytes.
    """

    path: Path
    head: bytes
    slots: Mapping[str, Slot]
    size: int

    @classmethod
    def open(cls, path: Path) -> TensorFile:
        """Reads the header.

        Raises:
            PeftGraphError: the file is missing or no whole safetensors file.
        """
        try:
            with safe_open(path, framework="pt"):  # checks that the places fit each other, the shapes and the file
                pass
            with path.open("rb") as file:
                length = file.read(8)
                head = length + file.read(int.from_bytes(length, "little"))
        except (OSError, SafetensorError) as error:
            raise PeftGraphError(f"{path} is no whole safetensors file: {error}") from None
        entries = {name: entry for name, entry in json.loads(head[8:]).items() if name != "__metadata__"}
        slots = {
            name: Slot(entry["dtype"], tuple(entry["shape"]), *(len(head) + place for place in entry["data_offsets"]))
            for name, entry in entries.items()
        }
        ordered = dict(sorted(slots.items(), key=lambda item: (item[1].begin, item[1].end)))
        return cls(path, head, ordered, path.stat().st_size)

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own.

        Raises:
            PeftGraphError: it is of no floating dtype that weights are merged in, or the file has changed.
        """
        slot = self.slots[name]
        if slot.dtype not in FLOATS:
            raise PeftGraphError(
                f"{self.path}: {name} is stored as {slot.dtype}. Only {', '.join(FLOATS)} weights are merged; "
                "a quantised one would have to be rounded anew."
            )
        data = bytearray(slot.end - slot.begin)
        with self.path.open("rb") as file:
            file.seek(slot.begin)
            if file.readinto(data) != len(data):
                raise PeftGraphError(f"{self.path} has changed: it ends within {name}.")
        if not data:
            return torch.empty(slot.shape, dtype=FLOATS[slot.dtype])
        return torch.frombuffer(data, dtype=FLOATS[slot.dtype]).reshape(slot.shape)

    def rewrite(
        self, target: BinaryIO, values: Mapping[str, Callable[[], Tensor]], wrote: Callable[[int], None]
    ) -> None:
        """Writes the file anew, in order, with other values for some tensors.

        Args:
            target: what to write to.
            values: gives the new values, when their turn comes.
            wrote: called with the number of bytes that were written since its last call.

        Raises:
            PeftGraphError: a new value has another shape or dtype, or the file has changed.
        """
        target.write(self.head)
        wrote(len(self.head))
        with self.path.open("rb", buffering=0) as source:
            for name, slot in self.slots.items():
                if name in values:
                    target.write(self._bytes(name, values[name]()))
                    wrote(slot.end - slot.begin)
                else:
                    self._copy(source, slot, target, wrote)

    def _bytes(self, name: str, value: Tensor) -> memoryview:
        slot = self.slots[name]
        if tuple(value.shape) != slot.shape or value.dtype != FLOATS.get(slot.dtype):
            raise PeftGraphError(
                f"{name} is {slot.dtype} {slot.shape} in {self.path}, and its new value is {value.dtype} "
                f"{tuple(value.shape)}."
            )
        return value.contiguous().reshape(-1).view(torch.uint8).numpy().data

    def _copy(self, source: BinaryIO, slot: Slot, target: BinaryIO, wrote: Callable[[int], None]) -> None:
        source.seek(slot.begin)
        left = slot.end - slot.begin
        while left:
            chunk = source.read(min(left, CHUNK))
            if not chunk:
                raise PeftGraphError(f"{self.path} has changed: it is shorter than its header says.")
            target.write(chunk)
            wrote(len(chunk))
            left -= len(chunk)
