"""Folders that appear whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from peftgraph.errors import PeftGraphError
from peftgraph.ir.files import atomic, whole_folder

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
OTHERS_LIMIT = 64 << 20  # bytes: what is larger is no tokenizer and no readme


@contextmanager
def atomic_folder(target: Path, force: bool = False) -> Iterator[Path]:
    """Gives a temporary sibling of `target`; it becomes `target` when the block succeeds.

    Raises:
        PeftGraphError: `target` holds something and `force` is off, or the disk refuses.
    """
    check_target(target, force)
    with whole_folder(target) as fresh:
        yield fresh


def check_target(target: Path, force: bool) -> None:
    """Refuses a file, and a folder that holds something unless `force` is on.

    Raises:
        PeftGraphError: it is one.
    """
    if target.exists() and not target.is_dir():
        raise PeftGraphError(f"{target} is a file, not a folder.")
    if target.is_dir() and any(target.iterdir()) and not force:
        raise PeftGraphError(f"{target} is not empty; --force replaces it.")


def copy_companions(source: Path, target: Path) -> list[str]:
    """Copies what travels with a model (tokenizer, processor, readme) but no weights; returns the names."""
    copied: list[str] = []
    for file in sorted(source.iterdir()):
        small = file.is_file() and file.stat().st_size <= OTHERS_LIMIT
        if (
            small
            and not file.name.endswith(WEIGHTS)
            and not file.name.startswith(".")
            and not (target / file.name).exists()
        ):
            with atomic(target / file.name) as temporary:
                shutil.copyfile(file, temporary)
            copied.append(file.name)
    return copied
