"""Exports to `.pt2`, the file format of torch.export."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram

from peftgraph.capture.diagnosis import exporter_silenced
from peftgraph.runtime.export.registry import Exporter


def write_pt2(exported: ExportedProgram, path: Path) -> None:
    """Write an exported program by torch.export.save."""
    with exporter_silenced():
        torch.export.save(exported, path)


def write_pt2_with_tensors(exported: ExportedProgram, path: Path, values: Mapping[str, Tensor]) -> None:
    """Write an exported program whose keyword `adapter_tensors` takes tensors; every call gives them."""
    write_pt2(exported, path)


EXPORTER = Exporter(
    name="pt2",
    description="torch.export; runs where torch is installed",
    write=write_pt2,
    write_with_tensors=write_pt2_with_tensors,
)
