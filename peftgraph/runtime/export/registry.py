"""Defines what an exporter is, and finds exporters by the suffix of the file that is to be written."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from peftgraph.errors import ExportError
from peftgraph.utils.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor
    from torch.export import ExportedProgram


@dataclass(frozen=True, kw_only=True)
class Exporter:
    """Writes programs as files of one format.

    Attributes:
        name: the suffix of its files, without the dot: "onnx".
        description: one line, for tables.
        write: writes an exported program to a path; inputs are keywords, the outputs a dict by name.
        requires: the modules that must be importable.
        install: the command that installs them, for the message when one is missing.
        write_with_tensors: writes a program whose keyword `adapter_tensors` is a dict of tensors; gets their values by
            name, for formats in which calls may omit them. None where the format has no such inputs.

    Example:
        >>> from peftgraph.plugins import EXPORTERS, Exporter
        >>> def write(exported, path):
        ...     path.write_text(str(exported.graph))
        >>> exporter = EXPORTERS.register(Exporter(name="graph", description="the graph as text", write=write))
    """

    name: str
    description: str
    write: Callable[[ExportedProgram, Path], None]
    requires: tuple[str, ...] = ()
    install: str = ""
    write_with_tensors: Callable[[ExportedProgram, Path, Mapping[str, Tensor]], None] | None = None

    @property
    def suffix(self) -> str:
        """The suffix of its files: ".onnx"."""
        return f".{self.name}"

    def check_installed(self) -> None:
        """Check that the modules that the exporter requires can be imported.

        Raises:
            ExportError: one cannot.
        """
        if any(importlib.util.find_spec(module) is None for module in self.requires):
            raise ExportError(f"{self.suffix} export needs {' and '.join(self.requires)}: {self.install}.")


EXPORTERS: Registry[Exporter] = Registry(
    "peftgraph.exporters",
    "exporter",
    ExportError,
    kind="Exporter",
    accepts=lambda one: isinstance(one, Exporter),
    name_of=lambda one: one.name,
)


def suffixes() -> str:
    """Name the suffixes that can be exported to: ".onnx, .pt2"; imports no exporter."""
    return ", ".join(f".{name}" for name in EXPORTERS.names())


def check_suffix(path: Path) -> None:
    """Refuse a file that no exporter writes, by its suffix; imports no exporter.

    Raises:
        ExportError: there is none for its suffix.
    """
    if path.suffix[1:] not in EXPORTERS.names():
        raise ExportError(
            f"{path}: the suffix says the format; known are {suffixes()}. Another is registered as an entry point of "
            f"the group {EXPORTERS.group!r}, or at run time (peftgraph.plugins)."
        )


def find_exporter(path: Path) -> Exporter:
    """Return the exporter for a file, by its suffix.

    Raises:
        ExportError: there is none, or what it requires is not installed.
    """
    check_suffix(path)
    exporter = EXPORTERS.get(path.suffix[1:])
    exporter.check_installed()
    return exporter
