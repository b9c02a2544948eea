"""Exports to `.onnx` by torch.onnx."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from peftgraph.capture.diagnosis import exporter_silenced
from peftgraph.errors import ExportError
from peftgraph.runtime.export.axis_names import axis_names, renamed
from peftgraph.runtime.export.registry import Exporter

LARGE = 1 << 30  # a file with that many bytes of weights keeps them beside it: protobuf ends at 2 GiB


def write_onnx(exported: ExportedProgram, path: Path) -> None:
    """Write an exported program by torch.onnx.export; large weights are written to a file next to it.

    Raises:
        ExportError: torch.onnx refuses.
    """
    spec = exported.call_spec.out_spec
    assert spec is not None
    try:
        with exporter_silenced():
            written = torch.onnx.export(exported, output_names=list(spec.context), dynamo=True, verbose=False)
    except Exception as error:  # the exporter raises many types; all mean that it refuses
        raise ExportError(f"torch.onnx refuses the program: {type(error).__name__}: {error}") from error
    assert written is not None
    _name_axes(written.model.graph, axis_names(exported))
    weights = sum(tensor.numel() * tensor.element_size() for tensor in exported.state_dict.values())
    with exporter_silenced():
        written.save(path, external_data=weights > LARGE)


def _name_axes(graph: Any, names: dict[str, str]) -> None:
    """Give the symbolic sizes of all values their names."""
    made = (value for node in graph.all_nodes() for value in node.outputs)
    for value in (*graph.inputs, *graph.outputs, *made):
        shape = value.shape
        if shape is not None and not all(isinstance(dim, int) for dim in shape):
            dims = [dim if isinstance(dim, int) or dim.value is None else renamed(dim.value, names) for dim in shape]
            value.shape = type(shape)(dims)


EXPORTER = Exporter(
    name="onnx",
    description="ONNX; runs in any ONNX runtime",
    write=write_onnx,
    requires=("onnx", "onnxscript"),
    install='pip install "peftgraph[onnx]"',
)
