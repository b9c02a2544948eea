"""Tells an adapter's folder from any other one, without reading the adapter."""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path

from peftgraph.errors import AdapterError
from peftgraph.utils.atomic_files import remove_leftovers

INDEX = "adapter.json"  # of this library's own format
FORMATS = "peftgraph.adapter_formats"  # the group of the entry points of other formats


def check_exists(directory: Path) -> None:
    """Refuse a path at which there is nothing; the formats themselves are recognised when the adapter is read.

    Raises:
        AdapterError: there is no folder.
    """
    if not directory.exists():
        remove_leftovers(directory.absolute().parent)  # a writer may have been killed while it replaced the directory
    if not directory.exists():
        raise no_adapter(directory, [point.name for point in entry_points(group=FORMATS)])


def no_adapter(directory: Path, formats: list[str]) -> AdapterError:
    """Return the error for a directory that contains no adapter."""
    return AdapterError(
        f"{directory} contains no {INDEX}, so it is no adapter directory of peftgraph, nor is it of another "
        f"format that is known: {', '.join(sorted(set(formats)))}."
    )
