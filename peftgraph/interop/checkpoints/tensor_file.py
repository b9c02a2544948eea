"""Reads a safetensors file tensor by tensor, and rewrites it as a stream with other values.

The safetensors library checks a file but cannot write one as a stream: `save_file` takes all tensors at once. What it
reads is mapped memory, which counts as the process's own for as long as the file is open. So tensors are read at the
offsets that the header gives, and a merged file is the header of its source, byte for byte, followed by the data in the
same order: shapes and dtypes do not change.

The format: 8 bytes with the length of the header, little-endian; the header, a JSON object from tensor to dtype, shape
and offsets; the data. Source: the safetensors README, "Format".
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from peftgraph.errors import PeftGraphError
from peftgraph.interop.checked_files import check_names
from peftgraph.interop.checkpoints.async_writer import AsyncWriter
from peftgraph.utils.strict_json import parse_json

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CHUNK = 8 << 20  # bytes copied at once
AHEAD = 64 << 20  # bytes read ahead


@dataclass(frozen=True)
class Slot:
    """The dtype, shape and position of a stored tensor.

    Attributes:
        dtype: in the format's spelling, such as BF16.
        shape: its sizes.
        begin, end: the range of its bytes in the file.
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
        head: the bytes before the data.
        slots: the tensors, in the order of their data.
        size: of the file, in bytes.
    """

    path: Path
    head: bytes
    slots: Mapping[str, Slot]
    size: int

    @classmethod
    def open(cls, path: Path) -> TensorFile:
        """Read the header.

        Raises:
            PeftGraphError: the file is missing or no whole safetensors file.
        """
        if path.exists() and not path.is_file():
            raise PeftGraphError(f"{path} is no regular file.")
        try:
            with safe_open(path, framework="pt"):  # checks the offsets against each other, the shapes and the file
                pass
            with path.open("rb") as file:
                length = file.read(8)
                head = length + file.read(int.from_bytes(length, "little"))
        except (OSError, SafetensorError) as error:
            raise PeftGraphError(f"{path} is no whole safetensors file: {error}") from None
        try:
            entries = {name: entry for name, entry in parse_json(head[8:].decode()).items() if name != "__metadata__"}
        except (ValueError, RecursionError) as error:
            raise PeftGraphError(f"{path} is no whole safetensors file: {error}") from None
        check_names(entries, path)
        slots = {
            name: Slot(entry["dtype"], tuple(entry["shape"]), *(len(head) + offset for offset in entry["data_offsets"]))
            for name, entry in entries.items()
        }
        ordered = dict(sorted(slots.items(), key=lambda item: (item[1].begin, item[1].end)))
        return cls(path, head, ordered, path.stat().st_size)

    def read(self, name: str, lend: Callable[[int], Tensor] | None = None) -> Tensor:
        """Read one tensor.

        Args:
            name: of the tensor.
            lend: returns the memory for so many bytes, (size,) uint8; by default the tensor has memory of its own.

        Raises:
            PeftGraphError: its dtype is none that weights are merged in, or the file has changed.
        """
        slot = self.slots[name]
        if slot.dtype not in FLOATS:
            raise PeftGraphError(
                f"{self.path}: {name} is stored as {slot.dtype}. Only {', '.join(FLOATS)} weights are merged; "
                "a quantised one would have to be rounded again."
            )
        size = slot.end - slot.begin
        data = torch.empty(size, dtype=torch.uint8) if lend is None else lend(size)
        with self.path.open("rb", buffering=0) as file:
            _read_into(file, slot.begin, data, self.path)
        return data.view(FLOATS[slot.dtype]).reshape(slot.shape)

    def rewrite(self, target: BinaryIO, values: Mapping[str, Callable[[], Tensor]], writer: AsyncWriter) -> None:
        """Write a copy of the file, in order, with other values for some tensors.

        Args:
            target: what to write to, unbuffered.
            values: compute the new values; called in the order of the file.
            writer: writes the data.

        Raises:
            PeftGraphError: a new value has another shape or dtype, or the file has changed.
        """
        writer.write(target, self.head)
        with self.path.open("rb", buffering=0) as source:
            for name, slot in self.slots.items():
                _read_ahead(source, slot)
                if name in values:
                    writer.write(target, self._bytes(name, values[name]()))
                else:
                    self._copy(source, slot, target, writer)
        writer.finish()

    def _bytes(self, name: str, value: Tensor) -> memoryview:
        slot = self.slots[name]
        if tuple(value.shape) != slot.shape or value.dtype != FLOATS.get(slot.dtype):
            raise PeftGraphError(
                f"{name} is {slot.dtype} {slot.shape} in {self.path}, and its new value is {value.dtype} "
                f"{tuple(value.shape)}."
            )
        return value.contiguous().reshape(-1).view(torch.uint8).numpy().data

    def _copy(self, source: FileIO, slot: Slot, target: BinaryIO, writer: AsyncWriter) -> None:
        for start in range(slot.begin, slot.end, CHUNK):
            data = writer.lend(min(CHUNK, slot.end - start))
            _read_into(source, start, data, self.path)
            writer.write(target, data.numpy().data)


def _read_into(file: FileIO, start: int, data: Tensor, path: Path) -> None:
    """Fill `data` with the bytes of a file from an offset on.

    Raises:
        PeftGraphError: the file is too short.
    """
    left = data.numpy().data
    file.seek(start)
    while left:
        count = file.readinto(left)
        if not count:
            raise PeftGraphError(f"{path} has changed: it is shorter than its header says.")
        left = left[count:]


def _read_ahead(file: FileIO, slot: Slot) -> None:
    """Ask the system, where it supports this, to read the data after a tensor ahead of time."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), slot.end, AHEAD, os.POSIX_FADV_WILLNEED)
