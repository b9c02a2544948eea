"""Runs a program on tensors without values, and counts what a step costs.

The graph runs under autograd on fake tensors of the CPU, so that what is saved for the backward pass is what a real
step saves there, and no memory is needed. A multiply-add counts as two operations, and only products are counted:
matrix products, convolutions and attentions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.fx.node import map_arg
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from peftgraph.errors import PeftGraphError
from peftgraph.ir.dtype_literals import convert_literals
from peftgraph.ir.modes import evaluation_graph, training_graph, without_cached_inputs
from peftgraph.ir.program import ProgramData

aten = torch.ops.aten
CPU = torch.device("cpu")


def _attention(query: torch.Size, key: torch.Size, value: torch.Size, *rest: Any, **named: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(
    grad: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *rest: Any, **named: Any
) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


# The CPU's attention, for which torch's counter has no formula.
FORMULAS: dict[Any, Any] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


@dataclass(frozen=True)
class StepCost:
    """What one call costs.

    Attributes:
        forward: operations of the forward pass.
        backward: operations of the backward pass; 0 in evaluation.
        saved: bytes that the forward pass keeps for the backward pass, besides stored tensors and inputs.
    """

    forward: int
    backward: int = 0
    saved: int = 0


def training_step(program: ProgramData, batch: int, length: int) -> StepCost:
    """Count a training step: forward, and backward from the sum of all floating outputs.

    Args:
        program: on any device; its values are not read.
        batch: rows of every input.
        length: tokens of every sequence.

    Raises:
        PeftGraphError: the model does not take these sizes, or what it computes depends on values.
    """
    return _run(program, training_graph(program.graph), batch, length, training=True)


def inference(program: ProgramData, batch: int, length: int) -> StepCost:
    """Count a call in evaluation, without a cache. Arguments and errors as for `training_step`."""
    return _run(program, evaluation_graph(program.graph), batch, length, training=False)


def _run(program: ProgramData, graph: fx.Graph, batch: int, length: int, *, training: bool) -> StepCost:
    shapes = _input_shapes(program, batch, length)
    cached = program.signature.cache_inputs
    if cached:
        graph = without_cached_inputs(graph, cached)
    if program.can_change_dtype:
        convert_literals(graph, program.table.dtype, CPU)
    with FakeTensorMode() as mode:
        inputs = {spec.name: torch.empty(shapes[spec.name], dtype=spec.dtype) for spec in program.signature.inputs}
        stored = _fake_tensors(program, mode, training)
        saved = _Saved(list(stored.values()) + list(inputs.values()))
        counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
        try:
            with counter, torch.set_grad_enabled(training), torch.autograd.graph.saved_tensors_hooks(saved, _same):
                leaves = _interpret(graph, stored, inputs)
                forward = counter.get_total_flops()
                if training:
                    _backward(leaves)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise PeftGraphError(
                f"What {program.model} computes depends on values ({error.func}), so its cost has no number."
            ) from None
        except RuntimeError as error:  # what torch says of sizes that do not fit
            raise PeftGraphError(f"{program.model} takes no batch of {batch} x {length}: {error}") from None
    return StepCost(forward, counter.get_total_flops() - forward, saved.bytes)


class _Saved:
    """Adds up the memory of what is saved, each storage once."""

    def __init__(self, known: list[Tensor]) -> None:
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}
        self._kept: list[Tensor] = []  # so that no storage takes the place of another
        self.bytes = 0

    def __call__(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self._kept.append(tensor)
            self.bytes += storage.nbytes()
        return tensor


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _input_shapes(program: ProgramData, batch: int, length: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of every input: the batch on its first axis, the length on every other free one.

    Raises:
        PeftGraphError: the model takes no such size.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for spec in program.signature.inputs:
        sizes = [dim if isinstance(dim, int) else length if axis else batch for axis, dim in enumerate(spec.dims)]
        for dim, size in zip(spec.dims, sizes, strict=True):
            least, most = program.signature.ranges.get(str(dim), (0, None))
            if size < least or (most is not None and size > most):
                limits = f"at least {least}" if most is None else f"{least} to {most}"
                raise PeftGraphError(f"{program.model}: the size {dim} of {spec.key} is {limits}, got {size}.")
        shapes[spec.name] = tuple(sizes)
    return shapes


def _fake_tensors(program: ProgramData, mode: FakeTensorMode, training: bool) -> dict[str, Tensor]:
    """Return the stored tensors without values; ties are kept."""
    made: dict[int, Tensor] = {}
    for entry in program.table.values():
        if id(entry.tensor) not in made:
            tensor = torch.empty_strided(
                entry.tensor.shape, entry.tensor.stride(), dtype=entry.tensor.dtype, device=CPU
            )
            made[id(entry.tensor)] = tensor.requires_grad_(training and entry.trainable)
    return {name: made[id(entry.tensor)] for name, entry in program.table.items()}


def _interpret(graph: fx.Graph, stored: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> list[Any]:
    """Return the leaves that a graph gives; values are freed after their last use."""
    values: dict[fx.Node, Any] = {}
    last_use = {operand: node for node in graph.nodes for operand in node.all_input_nodes}
    for node in graph.nodes:
        if node.op == "output":
            return list(map_arg(node.args[0], values.__getitem__))
        if node.op == "placeholder":
            values[node] = inputs[node.name]
        elif node.op == "get_attr":
            values[node] = stored[str(node.target)]
        else:
            args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)
        for operand in node.all_input_nodes:
            if last_use[operand] is node:
                values.pop(operand, None)
    raise AssertionError("a graph without an output")


def _backward(leaves: list[Any]) -> None:
    """Run the backward pass from the sum of all outputs that gradients flow from."""
    roots = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
    if roots:
        torch.autograd.backward(roots, [torch.empty_like(root) for root in roots])
