"""Exports to `.onnx` by torch.onnx."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.export import ExportedProgram

from peftgraph.capture.diagnosis import exporter_silenced
from peftgraph.errors import ExportError
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
    weights = sum(tensor.numel() * tensor.element_size() for tensor in exported.state_dict.values())
    with exporter_silenced():
        written.save(path, external_data=weights > LARGE)


EXPORTER = Exporter(
    name="onnx",
    description="ONNX; runs in any ONNX runtime",
    write=write_onnx,
    requires=("onnx", "onnxscript"),
    install='pip install "peftgraph[onnx]"',
)
