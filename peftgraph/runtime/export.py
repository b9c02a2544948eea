"""Writing a program as a file that runs without peftgraph: `.pt2` by torch.export, `.onnx` by torch.onnx."""

from __future__ import annotations

import importlib.util
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from peftgraph.capture.diagnosis import exporter_silenced
from peftgraph.errors import ExportError
from peftgraph.ir.program import ProgramData
from peftgraph.runtime.codegen import compile_graph
from peftgraph.runtime.module import GraphModule
from peftgraph.runtime.plain_aten import in_plain_aten
from peftgraph.utils.atomic_files import atomic_file

EQUAL_SIZES = re.compile(r"L\['\w+'\]\.size\(\)\[\d+\] == L\['\w+'\]\.size\(\)\[\d+\]")
LARGE = 1 << 30  # an ONNX file of this size keeps its weights beside it: protobuf ends at 2 GiB


def export(program: ProgramData, path: Path) -> Path:
    """Writes the evaluated graph to `path`; inputs are keywords with their own names, outputs a dict by name.

    Raises:
        ExportError: an unknown suffix, a missing package, weights on the meta device, or the exporter refuses.
        PeftGraphError: the disk refuses; a file that was there before stays whole.
    """
    writers: dict[str, Callable[[ExportedProgram, Path], None]] = {".pt2": _write_pt2, ".onnx": _write_onnx}
    if path.suffix not in writers:
        raise ExportError(f"{path}: the suffix says the format; known are {', '.join(writers)}.")
    if path.suffix == ".onnx" and importlib.util.find_spec("onnxscript") is None:
        raise ExportError('ONNX export needs onnx and onnxscript: pip install "peftgraph[onnx]".')
    if program.table.device.type == "meta":
        raise ExportError(f"{program.model} was traced on the meta device and has no weights to export.")
    exported = to_exported(program)
    with atomic_file(path) as temporary:
        writers[path.suffix](exported, temporary)
    return path


def to_exported(program: ProgramData) -> ExportedProgram:
    """The evaluated program as torch's own ExportedProgram, with dynamic batch and length.

    Raises:
        ExportError: torch.export refuses.
    """
    module, names = _module(program)
    inputs = dict(zip(names, program.example, strict=True))
    shapes = {
        name: {axis: Dim.AUTO for axis, dim in enumerate(spec.dims) if isinstance(dim, str)}
        for name, spec in zip(names, program.signature.inputs, strict=True)
    }
    try:
        with exporter_silenced():
            exported = torch.export.export(module, (), inputs, dynamic_shapes=shapes, strict=False)
    except Exception as error:  # the exporter raises many types; all mean that it refuses
        raise ExportError(f"torch.export refuses the program: {type(error).__name__}: {error}") from error
    # Other guards, such as 3 != 7 for the traced sizes, steer the exporter only: no operation of the graph needs them.
    guards: list[str] = getattr(exported, "_guards_code", [])
    exported._guards_code = [guard for guard in guards if EQUAL_SIZES.fullmatch(guard)]
    return exported


def _module(program: ProgramData) -> tuple[nn.Module, list[str]]:
    """The evaluated graph as a module that takes keywords and returns a dict, and the names of its inputs.

    They are the model's own arguments; what is nested in one keeps the graph's name for it.
    """
    net = GraphModule(program).eval()
    graph = in_plain_aten(net._peftgraph.graph_for(training=False)[0])
    leaves = graph.output_node().args[0]
    assert isinstance(leaves, list | tuple)
    keys = [key for key, leaf in zip(program.signature.output_keys, leaves, strict=True) if leaf is not None]
    graph.output_node().args = ([leaf for leaf in leaves if leaf is not None],)
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    names = [
        spec.key if spec.key.isidentifier() else node.name
        for node, spec in zip(placeholders, program.signature.inputs, strict=True)
    ]
    code = compile_graph(graph, program.model)

    def forward(**inputs: Tensor) -> dict[str, Any]:
        return dict(zip(keys, code(net, *(inputs[name] for name in names)), strict=True))

    parameters = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names]
    forward.__signature__ = inspect.Signature(parameters)
    net.forward = forward
    return net, names


def _write_pt2(exported: ExportedProgram, path: Path) -> None:
    with exporter_silenced():
        torch.export.save(exported, path)


def _write_onnx(exported: ExportedProgram, path: Path) -> None:
    spec = exported.call_spec.out_spec
    assert spec is not None
    try:
        with exporter_silenced():
            written = torch.onnx.export(exported, output_names=list(spec.context), dynamo=True, verbose=False)
    except Exception as error:
        raise ExportError(f"torch.onnx refuses the program: {type(error).__name__}: {error}") from error
    assert written is not None
    weights = sum(tensor.numel() * tensor.element_size() for tensor in exported.state_dict.values())
    with exporter_silenced():
        written.save(path, external_data=weights > LARGE)
