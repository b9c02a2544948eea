"""Files and folders are written under a temporary name and renamed, so that no reader ever sees half of one."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from peftgraph.errors import PeftGraphError


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Gives a temporary path in the folder of `path`, with its suffix; it becomes `path` when the block succeeds.

    Raises:
        PeftGraphError: the file cannot be written (no space, no permission); nothing of it is left, an old one stays.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.stem}-") as folder:
            temporary = Path(folder) / path.name
            yield temporary
            for extra in sorted(Path(folder).iterdir()):
                if extra != temporary:  # external data of a large ONNX file goes first: the file itself is the commit
                    os.replace(extra, path.parent / extra.name)
            with open(temporary, "rb") as handle:
                os.fsync(handle.fileno())
            os.replace(temporary, path)
    except OSError as error:
        raise PeftGraphError(f"{path} cannot be written: {error.strerror or error}. Nothing was changed.") from error


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Gives a temporary folder beside `target`; it becomes `target`, over an old one, when the block succeeds.

    Raises:
        PeftGraphError: the disk refuses; an old folder stays.
    """
    target = target.absolute()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
            fresh = Path(scratch) / "new"
            fresh.mkdir()
            yield fresh
            swap(fresh, target, Path(scratch) / "old")
    except OSError as error:
        raise PeftGraphError(f"{target} cannot be written: {error.strerror or error}. Nothing was changed.") from error


def swap(fresh: Path, target: Path, old: Path) -> None:
    """Puts `fresh` where `target` was; an old folder comes back if that fails."""
    if target.exists():
        os.replace(target, old)
    try:
        os.replace(fresh, target)
    except OSError:
        if old.exists():
            os.replace(old, target)
        raise
