"""The folder in which earlier traces are kept: where it is, how large it may be, and how it is emptied."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

LARGEST = 256 << 20  # bytes of all files
VARIABLE = "PEFTGRAPH_CACHE"


def cache_folder() -> Path:
    """Return the folder: $PEFTGRAPH_CACHE, or the one of this system's caches."""
    chosen = os.environ.get(VARIABLE)
    if chosen:
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "peftgraph"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "peftgraph" / "cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peftgraph"


def cached_files(folder: Path) -> list[tuple[Path, os.stat_result]]:
    """Return the files of a folder with their states, the least recently used first; other processes may be removing
    some."""
    found: list[tuple[Path, os.stat_result]] = []
    for path in folder.glob("*.trace"):
        with contextlib.suppress(OSError):
            found.append((path, path.stat()))
    return sorted(found, key=lambda one: one[1].st_mtime_ns)


def make_room(folder: Path, largest: int = LARGEST) -> None:
    """Remove the least recently used files until the others take at most `largest` bytes."""
    files = cached_files(folder)
    size = sum(state.st_size for _, state in files)
    for path, state in files[:-1]:
        if size <= largest:
            return
        with contextlib.suppress(OSError):
            path.unlink()
        size -= state.st_size


def clear(folder: Path) -> tuple[int, int]:
    """Remove every cached file; return how many there were, and their bytes."""
    files = cached_files(folder)
    for path, _ in files:
        path.unlink(missing_ok=True)
    return len(files), sum(state.st_size for _, state in files)
