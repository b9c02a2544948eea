"""Runs a part of a graph in training with a forward and a backward pass of their own (`peftgraph.optimise`).

The code is made at the first call of a kind, and checked there: outputs and gradients must be those of the plain code
to rounding. Where torch cannot trace the part, or the check fails, the plain code runs, and the report says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, fx, nn
from torch.autograd.function import once_differentiable

from peftgraph.errors import PeftGraphError
from peftgraph.optimise.joint_graph import JointGraph, is_dense, stride_order
from peftgraph.optimise.seeded_dropout import DROPOUT
from peftgraph.optimise.training_graphs import TrainingGraphs, make_training_graphs, optimised_joint_graph
from peftgraph.runtime.codegen import Code, compile_graph
from peftgraph.runtime.region_check import RegionCheck, compare_with_plain, leaf

Optimise = Literal["auto", "train", "infer", "off"]
STREAM_KEY = "stream"  # in a placeholder's metadata: whether it is the stream that enters a block
WORTHWHILE = 2**27  # multiplications of a call by stored matrices, from which on code of its own pays


@dataclass(frozen=True)
class TrainingOptions:
    """How the parts of a module train.

    Attributes:
        always: whether also small parts get code of their own.
        budget: the fraction of the bytes kept for the backward pass without any repeated product; 0 keeps only what
            enters a block.
        inference: whether the module has code for latency in evaluation.
        keep_logits: whether training returns logits of which it computes a loss.
    """

    always: bool = False
    budget: float = 1.0
    inference: bool = False
    keep_logits: bool = True


@dataclass(frozen=True)
class TrainingCode:
    """The code of a region for one kind of call."""

    forward: Code
    backward: Code
    graphs: TrainingGraphs
    check: RegionCheck | None = None


def training_options(optimise: Optimise, budget: float, keep_logits: bool = True) -> TrainingOptions | None:
    """Return the options for a module; None for the plain code.

    Raises:
        PeftGraphError: an argument has no meaning.
    """
    if optimise not in get_args(Optimise):
        raise PeftGraphError(f"optimise is one of {', '.join(get_args(Optimise))}, not {optimise!r}.")
    if not 0.0 <= budget <= 1.0:
        raise PeftGraphError(f"activation_budget is a fraction between 0 and 1, not {budget}.")
    if optimise == "off" and not keep_logits:
        raise PeftGraphError('keep_logits=False is an optimisation: it does not go with optimise="off".')
    if optimise == "off":
        return None
    return TrainingOptions(optimise == "train", budget, optimise == "infer", keep_logits)


class TrainingRegion:
    """A graph in training, for any number of modules that run it on tensors of their own.

    Attributes:
        graph: the graph; its stored tensors are those of a module.
        codes: the code by kind of call; None where the plain code runs.
        refusals: the reasons why plain code runs.
    """

    def __init__(self, graph: fx.Graph, plain: Code, title: str, options: TrainingOptions) -> None:
        self.graph, self.plain, self.title, self.options = graph, plain, title, options
        self.stored = tuple(str(node.target) for node in graph.nodes if node.op == "get_attr")
        inputs = [node for op in ("get_attr", "placeholder") for node in graph.find_nodes(op=op)]
        self.stream = tuple(bool(node.meta.get(STREAM_KEY)) for node in inputs)
        self.free = tuple(map(_free_axes, inputs))
        self.draws = any(node.target is DROPOUT and node.args[1] != 0.0 for node in graph.nodes)
        self.codes: dict[Any, TrainingCode | None] = {}
        self._joints: dict[Any, JointGraph] = {}
        self.refusals: list[str] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> TrainingRegion:
        return self  # it has no tensors, and copies of a module run the same code

    def __call__(self, module: nn.Module, *values: Any, recompute: bool = False) -> list[Any] | None:
        """Run the region on the tensors of a module and on other values that it reads; None if the plain code must run.

        Args:
            module: holds the stored tensors.
            values: of the graph's placeholders.
            recompute: keep nothing but the inputs.
        """
        operands = [*(_read(module, path) for path in self.stored), *values]
        if not self._is_worthwhile(operands):
            return None
        operands = [one if not isinstance(one, Tensor) or is_dense(one) else one.contiguous() for one in operands]
        device = next(one.device for one in operands if isinstance(one, Tensor))
        key = (recompute, _autocast(device), *map(_kind, operands, self.free))
        if key not in self.codes:
            self.codes[key] = self._checked_code(operands, 0.0 if recompute else self.options.budget, device)
        code = self.codes[key]
        return None if code is None else list(_Region.apply(code, device.type, *operands))

    def _is_worthwhile(self, operands: Sequence[Any]) -> bool:
        tensors = [one for one in operands if isinstance(one, Tensor)]
        if not any(one.requires_grad for one in tensors):
            return False
        if self.options.always:
            return True
        if self.draws and tensors[0].device.type == "cpu":
            return False  # drawing a dropout's factors once more costs more time there than is gained
        stored, values = tensors[: len(self.stored)], tensors[len(self.stored) :]
        rows = max((one.numel() // max(1, one.shape[-1]) for one in values if one.dim() > 1), default=0)
        return rows * sum(one.numel() for one in stored if one.dim() > 1) >= WORTHWHILE

    def _checked_code(self, operands: Sequence[Any], budget: float, device: torch.device) -> TrainingCode | None:
        """Make the code for a call and compare it with the plain code on that call; None where it cannot serve."""
        try:
            joint = self._joint(operands, device)
        except Exception as error:  # whatever torch's tracer or a derivative raises
            self.refusals.append(f"not traced: {type(error).__name__}: {error}".splitlines()[0])
            return None
        wanted = {i for i, one in enumerate(operands) if isinstance(one, Tensor) and one.requires_grad}
        graphs = make_training_graphs(joint, wanted, budget)
        forward, backward = (
            compile_graph(graph, f"{self.title} {name}")
            for graph, name in ((graphs.forward, "forward"), (graphs.backward, "backward"))
        )
        code = TrainingCode(forward, backward, graphs)
        check = compare_with_plain(
            self.plain, self.stored, lambda *leaves: _Region.apply(code, device.type, *leaves), operands, graphs
        )
        if check.difference is not None:
            self.refusals.append(check.difference)
            return None
        return replace(code, check=check)

    def _joint(self, operands: Sequence[Any], device: torch.device) -> JointGraph:
        """Return both passes for a kind of call; the first block, whose input needs no gradient, shares that of the
        others."""
        leaves = [
            leaf(one).requires_grad_() if stream and one.is_floating_point() else one
            for one, stream in zip(operands, self.stream, strict=True)
        ]
        key = (_autocast(device), *map(_kind, leaves, self.free))
        if key not in self._joints:
            self._joints[key] = optimised_joint_graph(self.graph, leaves)
        return self._joints[key]


def _read(module: nn.Module, path: str) -> Any:
    value: Any = module
    for name in path.split("."):
        value = getattr(value, name)
    return value


def _free_axes(node: fx.Node) -> frozenset[int]:
    """Return the axes of an input whose sizes differ between calls."""
    value = node.meta["val"]
    sizes = value.shape if isinstance(value, Tensor) else ()
    return frozenset(axis for axis, size in enumerate(sizes) if not isinstance(size, int))


def _kind(value: Any, free: frozenset[int]) -> Any:
    """Return what the code for a value depends on: sizes that differ between calls matter only if they are 0 or 1."""
    if not isinstance(value, Tensor):
        return int if type(value) is int and value > 1 else value
    sizes = tuple(-1 if axis in free and size > 1 else size for axis, size in enumerate(value.shape))
    return value.dtype, value.device, value.requires_grad, sizes, stride_order(value)


def _autocast(device: torch.device) -> torch.dtype | None:
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


class _Region(torch.autograd.Function):
    """A region with its own backward pass."""

    @staticmethod
    def forward(ctx: Any, code: TrainingCode, device: str, *operands: Any) -> tuple[Any, ...]:
        graphs = code.graphs
        with torch.autocast(device, enabled=False):  # what it casts is in the graph
            found = code.forward(None, *operands)
        outputs = found[: graphs.outputs]
        kept = [*(operands[i] for i in graphs.kept_inputs), *found[graphs.outputs :]]
        ctx.code, ctx.count, ctx.device = code, len(operands), device
        ctx.numbers = [None if isinstance(one, Tensor) else one for one in kept]
        ctx.save_for_backward(*(one for one in kept if isinstance(one, Tensor)))
        rest = set(range(graphs.outputs)) - set(graphs.differentiable)
        ctx.mark_non_differentiable(*(outputs[i] for i in rest if isinstance(outputs[i], Tensor)))
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        graphs: TrainingGraphs = ctx.code.graphs
        saved = iter(ctx.saved_tensors)
        kept = [next(saved) if one is None else one for one in ctx.numbers]
        with torch.autocast(ctx.device, enabled=False):
            found = ctx.code.backward(None, *kept, *(grads[i].contiguous() for i in graphs.differentiable))
        result: list[Any] = [None] * (ctx.count + 2)
        for i, grad in zip(graphs.wanted, found, strict=True):
            result[i + 2] = grad
        return tuple(result)
