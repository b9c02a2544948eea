"""Writes the merged shards of a checkpoint one after the other, and keeps those that are finished."""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from peftgraph.errors import PeftGraphError
from peftgraph.interop.checkpoints.async_writer import QUEUED, AsyncWriter, one_thread
from peftgraph.interop.checkpoints.checkpoint import INDEX, Checkpoint
from peftgraph.interop.checkpoints.updates import Read, Updates
from peftgraph.utils.atomic_files import atomic_file


def write_shards(
    checkpoint: Checkpoint, updates: Updates, target: Path, wrote: Callable[[int], None], limit: int = QUEUED
) -> int:
    """Write the merged shards of a checkpoint, and its index.

    A shard has a temporary name until it is whole and on the disk. A file with a shard's name and size is kept, so the
    folder must be of this merge. One thread writes finished tensors while the next one is computed. At any time, memory
    holds one changed tensor with the tensors that its new value is computed from, and at most `limit` bytes that are
    not written yet.

    Args:
        checkpoint: of the base.
        updates: what changes.
        target: the folder, which may hold finished shards.
        wrote: called with numbers of written bytes, kept shards included.
        limit: how many bytes of the checkpoint may be in memory, unless one changed tensor alone needs more.

    Returns:
        The number of shards that were kept.

    Raises:
        PeftGraphError: the disk refuses, or the checkpoint has changed meanwhile.
    """
    kept = 0
    changed = updates.changed
    with one_thread(), AsyncWriter(wrote, limit) as writer:
        read = partial(checkpoint.read, lend=writer.lend)
        for file in checkpoint.files:
            path = target / file.path.name
            if path.is_file() and path.stat().st_size == file.size:
                wrote(file.size)
                kept += 1
                continue
            values = {
                key: partial(_finite_value, checkpoint, updates, key, read) for key in file.slots if key in changed
            }
            with atomic_file(path) as temporary, temporary.open("wb", buffering=0) as handle:
                file.rewrite(handle, values, writer)
    if (checkpoint.folder / INDEX).is_file():
        with atomic_file(target / INDEX) as temporary:
            shutil.copyfile(checkpoint.folder / INDEX, temporary)
    return kept


def _finite_value(checkpoint: Checkpoint, updates: Updates, key: str, read: Read) -> Tensor:
    """Compute a new value and check that it is finite wherever the stored one is.

    Raises:
        PeftGraphError: it is not.
    """
    value = updates.value(key, read)
    if value.numel() and not all(map(math.isfinite, torch.aminmax(value))):  # fast, and no numbers come through
        new = ~torch.isfinite(value) & torch.isfinite(checkpoint.read(key))
        if bool(new.any()):
            raise PeftGraphError(
                f"{key}: {int(new.sum())} of its merged values are infinite or no numbers in {value.dtype}, and the "
                "base's are finite: the adapter is damaged, or needs a wider dtype."
            )
    return value


def check_space(checkpoint: Checkpoint, target: Path, begun: Path) -> None:
    """Check that the disk has space for the merged shards.

    Args:
        checkpoint: of the base.
        target: the folder to be made, an absolute path.
        begun: the folder with finished shards; it need not exist.

    Raises:
        PeftGraphError: it does not.
    """
    disk = next((folder for folder in (target, *target.parents) if folder.exists()), Path(target.anchor))
    free = shutil.disk_usage(disk).free
    wanted = checkpoint.size - sum(file.stat().st_size for file in begun.glob("*.safetensors"))
    if free < wanted:
        raise PeftGraphError(
            f"The merged shards take {wanted / 1e9:.2f} GB more, and {free / 1e9:.2f} GB are free at {disk}."
        )


def identity(checkpoint: Checkpoint, adapter: Iterable[Path]) -> str:
    """Hash the inputs of a merge: the contents of small files, and the header, size and time of shards."""
    digest = hashlib.sha256()
    index = checkpoint.folder / INDEX
    for path in (checkpoint.folder / "config.json", *([index] if index.is_file() else []), *adapter):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    for file in checkpoint.files:
        state = file.path.stat()
        digest.update(f"{file.path.name} {state.st_size} {state.st_mtime_ns}\n".encode() + file.head)
    return digest.hexdigest()
