"""Writes a file in a thread of its own while the next values are computed; another thread flushes it to the disk."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import BinaryIO, Self

import torch
from torch import Tensor

QUEUED = 192 << 20  # bytes that may wait to be written, unless a single tensor is larger
FLUSH = 32 << 20  # bytes after which the file is flushed, so that the disk is busy from the start
KEPT = 31 << 20  # glibc returns no freed block to the system that is smaller than the largest it freed, up to 32 MiB


@dataclass(frozen=True, eq=False)
class _QueuedWrite:
    """A write that is queued or running, and the memory that it frees."""

    done: Future[None]
    size: int
    memory: Sequence[Tensor]


class AsyncWriter:
    """Writes to files in order, in a thread of its own; another thread flushes what is written.

    Memory is lent to readers and used again: fresh memory costs a page fault for every 4 KiB, as much time as the
    computation. Leaving the `with` block waits for all writes, and raises the error of one that failed.

    Args:
        wrote: called, in the caller's thread, with the number of bytes that were written since its last call.
        limit: how many bytes may be lent or queued at a time, unless one tensor alone needs more.

    Example:
        >>> with AsyncWriter(print) as writer, open("out", "wb", buffering=0) as file:
        ...     writer.write(file, b"content")
    """

    def __init__(self, wrote: Callable[[int], None], limit: int = QUEUED) -> None:
        self._wrote, self._limit = wrote, limit
        self._thread, self._disk = ThreadPoolExecutor(1, "write"), ThreadPoolExecutor(1, "flush")
        self._flushing: Future[None] | None = None
        self._waiting: deque[_QueuedWrite] = deque()
        self._free: list[Tensor] = []
        self._lent: list[Tensor] = []
        self._unflushed = 0
        torch.empty(KEPT, dtype=torch.uint8)  # given back at once

    def lend(self, size: int) -> Tensor:
        """Lend memory, (size,) uint8 with any values, until the data of the next call of `write` is written."""
        while self._waiting and self._used + size > self._limit:
            self._finish()
        fits = [one for one in self._free if one.numel() >= size]
        memory = min(fits, key=Tensor.numel, default=None)
        if memory is None:
            self._free.clear()  # too small: free memory must not add to the memory in use
            memory = torch.empty(size, dtype=torch.uint8)
        else:
            self._free = [one for one in self._free if one is not memory]
        self._lent.append(memory)
        return memory[:size]

    def write(self, target: BinaryIO, data: bytes | memoryview) -> None:
        """Queue `data` to be written after all earlier data; it must not change until then."""
        lent, self._lent = self._lent, []
        self._waiting.append(_QueuedWrite(self._thread.submit(self._write, target, data), len(data), lent))
        while self._waiting and (self._waiting[0].done.done() or self._used > self._limit):
            self._finish()

    def finish(self) -> None:
        """Wait until everything is written.

        Raises:
            OSError: the data cannot be written.
        """
        while self._waiting:
            self._finish()
        self._flushed()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self._thread.shutdown(cancel_futures=True)
            self._disk.shutdown(cancel_futures=True)

    @property
    def _used(self) -> int:
        return sum(max(one.size, sum(map(Tensor.numel, one.memory))) for one in self._waiting) + sum(
            map(Tensor.numel, self._lent)
        )

    def _finish(self) -> None:
        first = self._waiting.popleft()
        first.done.result()
        self._free += first.memory
        self._wrote(first.size)

    def _write(self, target: BinaryIO, data: bytes | memoryview) -> None:
        left = memoryview(data)
        while left:
            left = left[target.write(left) :]
        self._unflushed += len(data)
        if self._unflushed >= FLUSH and (self._flushing is None or self._flushing.done()):
            self._flushed()
            self._flushing = self._disk.submit(os.fdatasync, target.fileno())
            self._unflushed = 0

    def _flushed(self) -> None:
        flushing, self._flushing = self._flushing, None
        if flushing is not None:
            flushing.result()


@contextmanager
def one_thread() -> Iterator[None]:
    """Limit torch to one thread: chunks are too small to share, and waiting for busy cores costs more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
