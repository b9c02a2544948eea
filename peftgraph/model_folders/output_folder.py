"""Writes folders that appear whole or not at all, and checks what they would replace."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from peftgraph.errors import PeftGraphError
from peftgraph.utils.atomic_files import atomic_directory, atomic_file, read_regular_file, sync_to_disk

WEIGHTS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".h5",
    ".msgpack",
    ".onnx",
    ".ckpt",
    ".index.json",
    ".ot",
    ".gguf",
    ".pt2",
)
MADE = ".peftgraph.json"  # in a folder that this command made
LARGEST_COMPANION = 64 << 20  # bytes: a larger file is no tokenizer and no readme


@contextmanager
def atomic_folder(target: Path, force: bool = False, reads: Iterable[Path] = ()) -> Iterator[Path]:
    """Yield a temporary sibling of `target`, which becomes `target` when the block succeeds.

    Args:
        target: the folder to make.
        force: replace it if this command made it.
        reads: folders that are read meanwhile, which are never replaced.

    Raises:
        PeftGraphError: `target` is not empty and may not be replaced, or it cannot be written.
    """
    reads = tuple(reads)
    check_target(target, force, reads)
    with atomic_directory(target, force) as fresh:
        yield fresh
        note_made(fresh, "")
        check_target(target, force, reads)


def check_target(target: Path, force: bool, reads: Iterable[Path] = ()) -> None:
    """Check that a folder may be written: it is new or empty, or `force` is on and this command made and does not read
    it.

    Raises:
        PeftGraphError: it may not.
    """
    if target.exists() and not target.is_dir():
        raise PeftGraphError(f"{target} is a file, not a folder.")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not force:
        raise PeftGraphError(f"{target} is not empty; --force replaces it if this command made it.")
    resolved = target.resolve()
    for path in (real for folder in reads for real in _real(folder)):
        if path.is_relative_to(resolved):
            raise PeftGraphError(f"{target} holds {path}, which is read here; choose another folder.")
    if made_of(target) is None:
        raise PeftGraphError(f"{target} was not made by this command, and --force replaces no other. Move it away.")


def note_made(folder: Path, job: str) -> None:
    """Record in a folder that this command made it, and from what."""
    (folder / MADE).write_text(json.dumps({"made_by": "peftgraph", "job": job}), encoding="utf-8")
    sync_to_disk(folder / MADE)


def made_of(folder: Path) -> str | None:
    """Return what this command made a folder from; None where it did not make it."""
    try:
        found = json.loads(read_regular_file(folder / MADE))
    except (OSError, ValueError, RecursionError):
        return None
    job = found.get("job") if isinstance(found, dict) and found.get("made_by") == "peftgraph" else None
    return job if isinstance(job, str) else None


Stamps = dict[Path, tuple[int, ...]]


def stamps(folders: Iterable[Path]) -> Stamps:
    """Return the size, the times and the inode of every file in some folders."""
    files = [path for folder in folders if folder.is_dir() for path in sorted(folder.iterdir()) if path.is_file()]
    states = ((path, path.stat()) for path in files)
    return {path: (one.st_size, one.st_mtime_ns, one.st_ctime_ns, one.st_ino) for path, one in states}


def check_unchanged(before: Stamps, folders: Iterable[Path]) -> None:
    """Check that no file has changed since its stamp was taken.

    Raises:
        PeftGraphError: one has; the message names the first.
    """
    now = stamps(folders)
    changed = next((path for path in before.keys() | now.keys() if before.get(path) != now.get(path)), None)
    if changed is not None:
        raise PeftGraphError(f"{changed} has changed while it was read, so nothing was made of it. Start again.")


def _real(folder: Path) -> list[Path]:
    """Return the paths of a folder and of the files in it, with links resolved."""
    inside = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path.resolve() for path in (folder, *inside)]


def copy_companions(source: Path, target: Path) -> list[str]:
    """Copy the files next to a model's weights (tokenizer, processor, readme); return their names."""
    copied: list[str] = []
    for file in sorted(source.iterdir()):
        small = file.is_file() and file.stat().st_size <= LARGEST_COMPANION
        if (
            small
            and not file.name.endswith(WEIGHTS)
            and not file.name.startswith(".")
            and not (target / file.name).exists()
        ):
            with atomic_file(target / file.name) as temporary:
                shutil.copyfile(file, temporary)
            copied.append(file.name)
    return copied
