"""Turns a program into torch's ExportedProgram, and writes it by the exporter of a file's suffix."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from peftgraph.capture.diagnosis import exporter_silenced
from peftgraph.errors import ExportError
from peftgraph.ir.program import ProgramData
from peftgraph.runtime.codegen import compile_graph
from peftgraph.runtime.export.registry import find_exporter
from peftgraph.runtime.module import GraphModule
from peftgraph.runtime.plain_aten import in_plain_aten
from peftgraph.utils.atomic_files import atomic_file

EQUAL_SIZES = re.compile(r"L\['\w+'\]\.size\(\)\[\d+\] == L\['\w+'\]\.size\(\)\[\d+\]")


def export_program(program: ProgramData, path: Path) -> Path:
    """Write the evaluation graph to `path`; inputs are keywords with their own names, outputs a dict by name.

    Raises:
        ExportError: no exporter has the suffix, a package is missing, the weights are on the meta device, or the
            exporter refuses.
        PeftGraphError: the file cannot be written; an existing one stays unchanged.
    """
    exporter = find_exporter(path)
    if program.table.device.type == "meta":
        raise ExportError(f"{program.model} was traced on the meta device and has no weights to export.")
    exported = to_exported_program(program)
    with atomic_file(path) as temporary:
        exporter.write(exported, temporary)
    return path


def to_exported_program(program: ProgramData) -> ExportedProgram:
    """Export the evaluation graph by torch.export, with dynamic batch and length.

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
    """Return the evaluation graph as a module that takes keywords and returns a dict, and the names of its inputs.

    The names are the model's own arguments; an input that is nested in an argument keeps the graph's name for it.
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
