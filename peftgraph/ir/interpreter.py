"""Runs a program's graph directly, without a module around it, for proofs and comparisons."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from peftgraph.ir.dtype_literals import convert_literals, widen_literals
from peftgraph.ir.graphs import call_nodes, stored_tensor_nodes
from peftgraph.ir.modes import evaluation_graph, training_graph, written_buffers
from peftgraph.ir.program import ProgramData
from peftgraph.ir.tensor_table import TensorEntry, TensorTable

aten = torch.ops.aten
MATRIX_PRODUCTS = {
    "linear",
    "addmm",
    "matmul",
    "mm",
    "bmm",
    "baddbmm",
    "conv1d",
    "conv2d",
    "einsum",
    "scaled_dot_product_attention",
    "grouped_mm_fallback",
}


Run = Callable[[Sequence[Tensor]], list[Tensor]]  # of a program, for inputs in placeholder order
ValueObserver = Callable[[fx.Node, Any], None]  # told of every value as it is computed


def run_in_evaluation(program: ProgramData, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensor outputs of a program in evaluation mode, for inputs in placeholder order."""
    return evaluation_run(program)(inputs)


def evaluation_run(program: ProgramData) -> Run:
    """Return what runs a program in evaluation mode, with its graph prepared once."""
    run = _prepared(program, training=False)
    return lambda inputs: [leaf for leaf in run(inputs, None) if isinstance(leaf, Tensor)]


def run_in_mode(
    program: ProgramData, inputs: Sequence[Tensor], *, training: bool, watcher: ValueObserver | None = None
) -> list[Any]:
    """Return the output leaves of a program in one mode, for inputs in placeholder order.

    Args:
        program: what to run; it is not changed, nor are its buffers.
        inputs: the tensors of a call.
        training: whether dropout and what else training does is part of it.
        watcher: called with every value, also of stored tensors (for one that the graph writes: the copy that is
            written).
    """
    return _prepared(program, training)(inputs, watcher)


def _prepared(program: ProgramData, training: bool) -> Callable[[Sequence[Tensor], ValueObserver | None], list[Any]]:
    """Return what runs a program in one mode."""
    graph = training_graph(program.graph) if training else evaluation_graph(program.graph)
    dtype, device = program.table.dtype, program.table.device
    if program.can_change_dtype:
        convert_literals(graph, dtype, device)
    recorded = {str(node.target): node.meta["val"].dtype for node in stored_tensor_nodes(graph)}
    moved: dict[int, Tensor] = {}
    for name, entry in program.table.items():
        if entry.quantised is None and (id(entry.tensor) not in moved or name in recorded):
            moved[id(entry.tensor)] = _beside(entry, recorded.get(name, dtype)).to(device)
    tensors = {name: moved[id(entry.tensor)] for name, entry in program.table.items() if entry.quantised is None}
    return lambda inputs, watcher: _interpret(graph, tensors, [value.to(device) for value in inputs], watcher)


def run_in_float64(program: ProgramData, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Return the outputs computed in float64 throughout: weights, inputs, upcasts of the model's own code, and float32
    tensors that torch makes from integers."""
    return float64_run(program)(inputs)


def float64_run(program: ProgramData) -> Run:
    """Return what runs a program in float64, with its graph and weights prepared once."""
    graph = evaluation_graph(program.graph)
    widen_literals(graph)
    device = program.table.device
    stored = {name: entry.tensor for name, entry in program.table.items() if entry.quantised is None}
    doubled = {id(tensor): _double(tensor).to(device) for tensor in stored.values()}
    tensors = {name: doubled[id(tensor)] for name, tensor in stored.items()}

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        leaves = _interpret(graph, tensors, [_double(value).to(device) for value in inputs], wide=True)
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    return run


def compute_node(wanted: fx.Node, known: Mapping[fx.Node, Any], table: Mapping[str, TensorEntry]) -> Any:
    """Compute the value of one node from known values and stored tensors; only its ancestors are run."""
    values = dict(known)
    todo = [wanted]
    with torch.no_grad():
        while todo:
            node = todo[-1]
            waiting = [operand for operand in node.all_input_nodes if operand not in values]
            if node in values or waiting:
                todo += waiting
                if not waiting:
                    todo.pop()
                continue
            if node.op == "get_attr":
                values[node] = table[str(node.target)].tensor.detach()
            else:
                assert node.op == "call_function", f"%{node.name} is an input that has no value"
                assert not isinstance(node.target, str)
                values[node] = node.target(*map_arg(node.args, values.get), **map_arg(node.kwargs, values.get))
            todo.pop()
    return values[wanted]


def fake_table(table: TensorTable, mode: FakeTensorMode) -> TensorTable:
    """Return the stored tensors as fake tensors of the same shapes and dtypes."""

    def fake(entry: TensorEntry) -> TensorEntry:
        with mode:
            tensor = torch.empty(entry.tensor.shape, dtype=entry.tensor.dtype)
        return TensorEntry(tensor, entry.kind)

    return TensorTable((name, fake(entry)) for name, entry in table.items())


def count_matrix_products(graph: fx.Graph) -> int:
    """Count the matrix products that a graph computes."""
    return sum(
        node.target._schema.name.split("::")[-1] in MATRIX_PRODUCTS
        for node in call_nodes(graph)
        if isinstance(node.target, torch._ops.OpOverload)
    )


def _beside(entry: TensorEntry, dtype: torch.dtype) -> Tensor:
    """Cast a tensor to the dtype that the graph reads it in; a trainable one may have been converted with its
    module."""
    return entry.tensor.to(dtype) if entry.trainable and entry.tensor.is_floating_point() else entry.tensor


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _interpret(
    graph: fx.Graph,
    tensors: Mapping[str, Tensor],
    inputs: Sequence[Tensor],
    watcher: ValueObserver | None = None,
    wide: bool = False,
) -> list[Any]:
    values: dict[fx.Node, Any] = {}
    last_use = {operand: node for node in graph.nodes for operand in node.all_input_nodes}
    arguments = iter(inputs)
    # Names that share a tensor share the copy that is written.
    copies = {id(tensors[name]): tensors[name].detach().clone() for name in written_buffers(graph)}
    with torch.no_grad():
        for node in graph.nodes:
            if node.op == "output":
                return list(map_arg(node.args[0], values.__getitem__))
            if node.op == "placeholder":
                values[node] = next(arguments)
            elif node.op == "get_attr":
                tensor = tensors[str(node.target)]
                values[node] = copies[id(tensor)] if id(tensor) in copies else tensor.detach()
            else:
                args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
                result = node.target(*args, **kwargs)
                values[node] = pytree.tree_map_only(Tensor, _double, result) if wide else result
            if watcher is not None:
                watcher(node, values[node])
            for operand in node.all_input_nodes:
                if last_use[operand] is node:
                    values.pop(operand, None)
    raise AssertionError("a graph without an output")
