"""Exports to `.onnx` by torch.onnx."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from peftgraph.capture.diagnosis import exporter_silenced
from peftgraph.errors import ExportError
from peftgraph.runtime.export.axis_names import axis_names, renamed
from peftgraph.runtime.export.registry import Exporter

LARGE = 1 << 30  # a file with that many bytes of weights keeps them beside it: protobuf ends at 2 GiB


def write_onnx(exported: ExportedProgram, path: Path, values: Mapping[str, Tensor] | None = None) -> None:
    """Write an exported program by torch.onnx.export; large weights are written to a file next to it.

    Args:
        exported: the program.
        path: of the file.
        values: by name, those of the last inputs, which calls may omit.

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
    if values:
        _make_optional(written.model.graph, values)
    weights = sum(tensor.numel() * tensor.element_size() for tensor in exported.state_dict.values())
    with exporter_silenced():
        written.save(path, external_data=weights > LARGE)


def _make_optional(graph: Any, values: Mapping[str, Tensor]) -> None:
    """Give the last inputs the names of stored tensors, sizes of their own, and the values that they have where a call
    omits them."""
    import onnx_ir

    for value, (name, tensor) in zip(graph.inputs[-len(values) :], values.items(), strict=True):
        value.name = name
        value.const_value = onnx_ir.tensor(tensor.cpu().contiguous(), name=name)
        graph.register_initializer(value)


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
    write_with_tensors=write_onnx,
    requires=("onnx", "onnxscript"),
    install='pip install "peftgraph[onnx]"',
)
