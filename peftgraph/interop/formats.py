"""Adapter directories by their format: our own, peft's, or that of the `adapters` library."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from peftgraph.interop import native
from peftgraph.interop.adapterhub.directory import is_adapters, load_adapters
from peftgraph.interop.peft.config import CONFIG
from peftgraph.interop.peft.directory import load_peft
from peftgraph.ir.program import ProgramData
from peftgraph.sites import Sites
from peftgraph.utils.atomic_files import remove_leftovers

P = TypeVar("P", bound=ProgramData)


def load_directory(program: P, sites: Sites, apply: Callable[..., P], directory: Path, name: str | None) -> P:
    """The program after the adapter of a directory, whose files say which format it is.

    Args:
        program: what the adapter is put on; it is unchanged whatever happens.
        sites: its sites.
        apply: its verb that applies passes.
        directory: where the adapter lies.
        name: a name for the adapter's passes, instead of the ones they were saved with.

    Raises:
        AdapterError: the files are missing, damaged, fit another base, or say what no pass does.
        Conflict: an adapter of that name is there already.
    """
    if not directory.exists():
        remove_leftovers(directory.absolute().parent)  # a writer may have been killed while it put another in its place
    if is_peft(directory):
        return load_peft(program, sites, apply, directory, name)
    if (directory / native.INDEX).exists() or not (directory / CONFIG).exists():
        return native.load(program, apply, directory, name)
    return load_adapters(program, sites, apply, directory, name)


def is_peft(directory: Path) -> bool:
    """Whether an adapter's directory is peft's: our own have another index, and the `adapters` library another form."""
    found = (directory / CONFIG).exists() and not (directory / native.INDEX).exists()
    return found and not is_adapters(directory)
