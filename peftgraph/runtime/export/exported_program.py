"""Turns a program into torch's ExportedProgram, and writes it by the exporter of a file's suffix."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from peftgraph.capture.diagnosis import exporter_silenced
from peftgraph.errors import ExportError
from peftgraph.ir.program import ProgramData
from peftgraph.runtime.codegen import compile_graph
from peftgraph.runtime.export.registry import find_exporter
from peftgraph.runtime.module import GraphModule
from peftgraph.runtime.plain_aten import in_plain_aten
from peftgraph.utils.atomic_files import atomic_file

TENSORS = "adapter_tensors"  # the keyword of the tensors that are inputs
EQUAL_SIZES = re.compile(r"L\['\w+'\]\.size\(\)\[\d+\] == L\['\w+'\]\.size\(\)\[\d+\]")


def export_program(program: ProgramData, path: Path, given: Sequence[str] = ()) -> Path:
    """Write the evaluation graph to `path`; inputs are keywords with their own names, outputs a dict by name.

    Args:
        program: what to write.
        path: of the file.
        given: the names of tensors that are inputs of the file. Where the format has inputs that calls may omit, their
            values are in the file too.

    Raises:
        ExportError: no exporter has the suffix, a package is missing, the weights are on the meta device, or the
            exporter refuses.
        PeftGraphError: the file cannot be written; an existing one stays unchanged.
    """
    exporter = find_exporter(path)
    if program.table.device.type == "meta":
        raise ExportError(f"{program.model} was traced on the meta device and has no weights to export.")
    exported = to_exported_program(program, given)
    defaults = adapter_values(program, given)
    with atomic_file(path) as temporary:
        if not given:
            exporter.write(exported, temporary)
        elif exporter.write_with_tensors is None:
            raise ExportError(f"{path.suffix} files cannot have an adapter's tensors as inputs.")
        else:
            exporter.write_with_tensors(exported, temporary, defaults)
    return path


def to_exported_program(program: ProgramData, given: Sequence[str] = ()) -> ExportedProgram:
    """Export the evaluation graph by torch.export, with dynamic batch and length.

    Args:
        program: what to export.
        given: the names of tensors that the keyword `adapter_tensors` has, a dict; their sizes are dynamic.

    Raises:
        ExportError: torch.export refuses.
    """
    module, names = _module(program, given)
    inputs: dict[str, Any] = dict(zip(names, program.example, strict=True))
    shapes: dict[str, Any] = {
        name: {axis: Dim.AUTO for axis, dim in enumerate(spec.dims) if isinstance(dim, str)}
        for name, spec in zip(names, program.signature.inputs, strict=True)
    }
    if given:
        inputs[TENSORS] = adapter_values(program, given)
        shapes[TENSORS] = {name: dict.fromkeys(range(one.dim()), Dim.AUTO) for name, one in inputs[TENSORS].items()}
    try:
        with exporter_silenced():
            exported = torch.export.export(module, (), inputs, dynamic_shapes=shapes, strict=False)
    except Exception as error:  # the exporter raises many types; all mean that it refuses
        raise ExportError(f"torch.export refuses the program: {type(error).__name__}: {error}") from error
    # Other guards, such as 3 != 7 for the traced sizes, steer the exporter only: no operation of the graph needs them.
    guards: list[str] = getattr(exported, "_guards_code", [])
    exported._guards_code = [guard for guard in guards if EQUAL_SIZES.fullmatch(guard)]
    return exported


def _module(program: ProgramData, given: Sequence[str] = ()) -> tuple[nn.Module, list[str]]:
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
    scalars = {name for name in given if not program.table[name].tensor.dim()}
    if given:
        _read_as_inputs(graph, given)
    code = compile_graph(graph, program.model)

    def forward(**inputs: Any) -> dict[str, Any]:
        tensors = [inputs[TENSORS][name] for name in given]
        tensors = [one.reshape(()) if name in scalars else one for name, one in zip(given, tensors, strict=True)]
        return dict(zip(keys, code(net, *(inputs[name] for name in names), *tensors), strict=True))

    keywords = [*names, TENSORS] if given else names
    parameters = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in keywords]
    forward.__signature__ = inspect.Signature(parameters)
    net.forward = forward
    return net, names


def adapter_tensors(program: ProgramData) -> list[str]:
    """Return the names of the tensors that passes, or served adapters, added to a program and that its graph reads.

    Raises:
        ExportError: there are none.
    """
    base = program.base or program
    read = dict.fromkeys(str(node.target) for node in program.graph.nodes if node.op == "get_attr")
    known = {} if base is program or program.served is not None else base.table
    found = [name for name in read if program.table[name].added and name not in known]
    if not found:
        raise ExportError(f"{program.model} has no adapter whose tensors could be inputs.")
    return found


def adapter_values(program: ProgramData, names: Sequence[str]) -> dict[str, Tensor]:
    """Return tensors as a file takes them: numbers have an axis, which ONNX Runtime's adapter files require."""
    found = {name: program.table[name].tensor.detach() for name in names}
    return {name: one if one.dim() else one.reshape(1) for name, one in found.items()}


def _read_as_inputs(graph: fx.Graph, given: Sequence[str]) -> None:
    """Put further inputs in the place of stored tensors, in their order."""
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    for number, name in enumerate(given):
        with graph.inserting_after(last):
            last = graph.placeholder(f"{TENSORS}_{number}")
        for node in list(graph.nodes):
            if node.op == "get_attr" and node.target == name:
                last.meta |= {key: node.meta[key] for key in ("val",) if key in node.meta}
                node.replace_all_uses_with(last)
                graph.erase_node(node)
