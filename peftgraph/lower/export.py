"""Writing a program as a file that runs without peftgraph: `.pt2` by torch.export, `.onnx` by torch.onnx."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.export import Dim, ExportedProgram

from peftgraph.errors import ExportError
from peftgraph.ir.files import atomic
from peftgraph.ir.program import ProgramData
from peftgraph.lower.module import GraphModule
from peftgraph.lower.portable import portable


def export(program: ProgramData, path: Path) -> Path:
    """Writes the evaluated graph to `path`; inputs keep their names, outputs become a dict by name.

    Raises:
        ExportError: an unknown suffix, a missing package, weights on the meta device, or the exporter's
            refusal.
    """
    writers: dict[str, Callable[[ExportedProgram, Path], None]] = {".pt2": _write_pt2, ".onnx": _write_onnx}
    if path.suffix not in writers:
        raise ExportError(f"{path}: the suffix says the format; known are {', '.join(writers)}.")
    if program.table.device.type == "meta":
        raise ExportError(f"{program.model} was traced on the meta device and has no weights to export.")
    exported = to_exported(program)
    with atomic(path) as temporary:
        writers[path.suffix](exported, temporary)
    return path


def to_exported(program: ProgramData) -> ExportedProgram:
    """The evaluated program as torch's own ExportedProgram, with dynamic batch and length."""
    net = GraphModule(program).eval()
    graph = portable(net.graph_for(training=False)[0])
    leaves = graph.output_node().args[0]
    assert isinstance(leaves, list | tuple)
    results = {
        key: leaf for key, leaf in zip(program.signature.output_keys, leaves, strict=True) if leaf is not None
    }
    graph.output_node().args = (results,)
    module = fx.GraphModule(net, graph)
    shapes = tuple(
        {axis: Dim.AUTO for axis, dim in enumerate(spec.dims) if isinstance(dim, str)}
        for spec in program.signature.inputs
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's notes about its own internals
        try:
            return torch.export.export(module, tuple(program.example), dynamic_shapes=shapes, strict=False)
        except Exception as error:  # the exporter raises many types; all mean that it refuses
            raise ExportError(f"torch.export refuses the program: {type(error).__name__}: {error}") from error


def _write_pt2(exported: ExportedProgram, path: Path) -> None:
    torch.export.save(exported, path)


def _write_onnx(exported: ExportedProgram, path: Path) -> None:
    try:
        import onnxscript  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError:
        raise ExportError('ONNX export needs onnx and onnxscript: pip install "peftgraph[onnx]".') from None
    names: list[Any] = (
        list(exported.call_spec.out_spec.context) if exported.call_spec.out_spec is not None else []
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            onnx_program = torch.onnx.export(exported, output_names=names, dynamo=True, verbose=False)
        except Exception as error:
            raise ExportError(f"torch.onnx refuses the program: {type(error).__name__}: {error}") from error
    assert onnx_program is not None
    large = sum(t.numel() * t.element_size() for t in exported.state_dict.values()) > 1 << 30
    onnx_program.save(path, external_data=large)
