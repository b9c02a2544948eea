"""Defines what a foreign adapter format is, and reads and writes adapter directories by their format.

This library's own format (`peftgraph.interop.native`) is built in. The others are plug-ins: entry points of the group
"peftgraph.adapter_formats", or registered at run time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from torch import nn

from peftgraph.errors import AdapterError
from peftgraph.interop import native
from peftgraph.interop.adapter_folder import FORMATS, INDEX, no_adapter
from peftgraph.interop.checkpoints.checkpoint import Checkpoint
from peftgraph.interop.checkpoints.updates import Updates
from peftgraph.interop.pass_values import load_passes
from peftgraph.ir.program import ProgramData
from peftgraph.rewrite.method import PassWithValues
from peftgraph.sites import Sites
from peftgraph.utils.atomic_files import remove_leftovers
from peftgraph.utils.registry import Registry

P = TypeVar("P", bound=ProgramData)
OWN = "peftgraph"


@dataclass(frozen=True, kw_only=True)
class AdapterFormat:
    """A format in which other software stores adapters in a directory. Functions that it does not support are None.

    Attributes:
        name: its name in `save_adapter(..., format=name)`.
        description: one line, for tables.
        detect: whether a directory is of this format, by the files in it; called for directories without an
            `adapter.json` only.
        read: returns the passes of a directory with the values of their parameters, for a program and its sites.
        write: writes the adapter of a program, with its sites, to a directory.
        checkpoint_updates: returns what merging the adapter changes in a checkpoint, tensor by tensor, for the base on
            the meta device, without a trace. A merge uses it by default.

    Example:
        >>> from peftgraph.plugins import ADAPTER_FORMATS, AdapterFormat
        >>> ADAPTER_FORMATS.register(AdapterFormat(
        ...     name="mine", description="my trainer's files",
        ...     detect=lambda directory: (directory / "mine.json").exists(), read=read, write=write))
        >>> program.load_adapter("directory")  # or save_adapter("directory", format="mine")
    """

    name: str
    description: str
    detect: Callable[[Path], bool]
    read: Callable[[ProgramData, Sites, Path], Sequence[PassWithValues]] | None = None
    write: Callable[[ProgramData, Sites, Path], object] | None = None
    checkpoint_updates: Callable[[nn.Module, Path, Checkpoint], Updates] | None = None


ADAPTER_FORMATS: Registry[AdapterFormat] = Registry(
    FORMATS,
    "adapter format",
    AdapterError,
    kind="AdapterFormat",
    accepts=lambda one: isinstance(one, AdapterFormat),
    name_of=lambda one: one.name,
)


def find_format(directory: Path) -> AdapterFormat | None:
    """Return the foreign format of an adapter's directory; None where it is this library's own, or of no known format.

    Raises:
        AdapterError: several formats recognise it, or its files are damaged.
    """
    if (directory / INDEX).exists() or not directory.is_dir():
        return None
    found = [one for one in ADAPTER_FORMATS if one.detect(directory)]
    if len(found) > 1:
        names = ", ".join(one.name for one in found)
        raise AdapterError(f"{directory} is recognised by several adapter formats: {names}. Say which one: format=...")
    return found[0] if found else None


def load_adapter(
    program: P, sites: Sites, apply: Callable[..., P], directory: Path, name: str | None, format: str | None
) -> P:
    """Apply the adapter in a directory.

    Args:
        program: what the adapter is applied to; it is unchanged whatever happens.
        sites: its sites.
        apply: its method that applies passes.
        directory: of the adapter.
        name: for the adapter's passes, instead of their saved names.
        format: of the directory; None to recognise it by its files.

    Raises:
        AdapterError: the files are missing, damaged, fit another base, or say what no pass does; or the format is
            unknown.
        Conflict: an adapter of that name was applied already.
    """
    if not directory.exists():
        remove_leftovers(directory.absolute().parent)  # a writer may have been killed while it replaced the directory
    chosen = find_format(directory) if format is None else _named(format)
    if chosen is None:
        _check_own(directory)
        return native.load(program, apply, directory, name)
    if chosen.read is None:
        raise AdapterError(f"Adapters in the format {chosen.name!r} are written only, not read.")
    return load_passes(program, apply, chosen.read(program, sites, directory), directory, name)


def save_adapter(program: ProgramData, sites: Sites, directory: Path, format: str) -> Path:
    """Write the adapter of a program in a format; return the directory.

    Raises:
        AdapterError: the format is unknown or only read, there is nothing to save, or the format cannot express it.
        PeftGraphError: the directory cannot be written; its earlier content stays.
    """
    chosen = _named(format)
    if chosen is None:
        return native.save(program, directory)
    if chosen.write is None:
        raise AdapterError(f"Adapters in the format {chosen.name!r} are read only, not written.")
    chosen.write(program, sites, directory)
    return directory


def _check_own(directory: Path) -> None:
    """Check that a directory of no foreign format is this library's own.

    Raises:
        AdapterError: it has no `adapter.json`.
    """
    if not (directory / INDEX).exists():
        raise no_adapter(directory, ADAPTER_FORMATS.names())


def _named(format: object) -> AdapterFormat | None:
    """Return the foreign format with a name; None for this library's own.

    Raises:
        AdapterError: there is none of that name.
    """
    if format == OWN:
        return None
    if not isinstance(format, str) or format not in ADAPTER_FORMATS.names():
        known = ", ".join([OWN, *ADAPTER_FORMATS.names()])
        raise AdapterError(
            f"format must be one of {known}, got {format!r}. Another is registered as an entry point of the group "
            f"{ADAPTER_FORMATS.group!r}, or at run time (peftgraph.plugins)."
        )
    return ADAPTER_FORMATS.get(format)
