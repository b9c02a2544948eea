"""What a program's module runs: its graph in each mode, and the code of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from peftgraph.ir.dead_code import bypass_full_slices, remove_dead_nodes
from peftgraph.ir.dtype_literals import convert_literals
from peftgraph.ir.graphs import copy_graph
from peftgraph.ir.modes import (
    evaluation_graph,
    training_graph,
    without_cached_inputs,
    without_inputs,
    written_inputs,
)
from peftgraph.ir.program import ProgramData
from peftgraph.ir.signature import Signature
from peftgraph.optimise.chunked_loss import chunk_losses
from peftgraph.runtime.block_calls import outline_blocks
from peftgraph.runtime.block_regions import BlockRegion, mark_block_regions
from peftgraph.runtime.codegen import Code, compile_graph
from peftgraph.runtime.inference import InferenceCode
from peftgraph.runtime.training_region import TrainingOptions, TrainingRegion


class Execution:
    """The graph of a program, kept apart from the module that runs it: a model may call its own parts anything.

    Attributes:
        signature: how the module is called.
        graph: of both modes.
        title: the name of the model.
        can_change_dtype: whether it is known which casts follow the weights.
        target: the dtype and device of the weights.
        constants: the names of tensor literals.
        state: the buffers that training writes and the program shares, by name.
        trainable: the program's parameters, which the module shares unless it is sharded.
        regions: the parts that have run in training with code of their own.
        inference: the code for latency in evaluation, by the inputs that calls omit.
    """

    def __init__(
        self, program: ProgramData, blocks: Sequence[BlockRegion], options: TrainingOptions | None = None
    ) -> None:
        self.signature: Signature = program.signature
        self.graph = copy_graph(program.graph)
        self.title = program.model
        self.can_change_dtype = program.can_change_dtype
        self.target = (program.table.dtype, program.table.device)
        self.blocks = tuple(blocks)
        self.constants: list[str] = []
        self.state: dict[str, Tensor] = {}
        self.trainable = dict(program.table.trainable)
        self._codes: dict[tuple[bool, frozenset[str]], tuple[Code, tuple[bool, ...]]] = {}
        self._sources: dict[str, Code] = {}
        self._options = options
        self.regions: dict[Any, TrainingRegion] = {}
        self.inference: dict[frozenset[str], InferenceCode] = {}
        mark_block_regions(self.graph, self.blocks)

    def missing(self, tensors: Sequence[Tensor | None]) -> frozenset[str]:
        """Return the names of the inputs that a call omits."""
        return frozenset(spec.name for spec, value in zip(self.signature.inputs, tensors, strict=True) if value is None)

    def run(self, net: nn.Module, tensors: Sequence[Tensor | None], missing: frozenset[str]) -> Any:
        """Run code that `prepare` made, and return its outputs."""
        code, kept = self._codes[net.training, missing]
        given = [value for value in tensors if value is not None]
        leaves = self._run_inference(net, given, missing)
        if leaves is None:
            leaves = code(net, *given)
        return build_outputs(self.signature.outputs, leaves, kept)

    def _run_inference(self, net: nn.Module, given: list[Tensor], missing: frozenset[str]) -> list[Any] | None:
        """Run code for latency; None if the plain code must run."""
        if net.training:
            for one in self.inference.values():
                one.forget()
            return None
        return self.inference[missing].run(net, given) if missing in self.inference else None

    def prepare(self, net: nn.Module, missing: frozenset[str]) -> None:
        """Compile, once, the code that runs in the module's mode without the inputs in `missing`."""
        key = (net.training, missing)
        if key not in self._codes:
            graph, kept = self.graph_for(*key)
            if net.training and self._options is not None and not self._options.keep_logits:
                dropped = chunk_losses(graph)
                remove_dead_nodes(graph)
                kept = tuple(flag and i not in dropped for i, flag in enumerate(kept))
            name = "-".join(["training" if net.training else "evaluation", *sorted(missing)])
            region = self._region if net.training else lambda graph, code: None
            outlined = self._compiled(outline_blocks(graph, self.blocks, name, self._compiled, net, region))
            self._codes[key] = (outlined, kept)
            if self._options is not None and self._options.inference and not net.training:
                self.inference[missing] = InferenceCode(graph, outlined, self.title)

    def graph_for(self, training: bool, missing: frozenset[str] = frozenset()) -> tuple[fx.Graph, tuple[bool, ...]]:
        """Return the graph that runs in a mode without the inputs in `missing`, and which output leaves remain.

        Raises:
            CallError: every output depends on a missing input.
        """
        graph = training_graph(self.graph) if training else evaluation_graph(self.graph)
        remove_dead_nodes(graph)
        bypass_full_slices(graph)
        return without_missing_inputs(graph, self.signature, missing)

    def move(self, dtype: torch.dtype, device: torch.device) -> None:
        """Convert the graph's literals to the dtype and device that the weights were moved to."""
        if (dtype, device) != self.target:
            self.target = (dtype, device)
            convert_literals(self.graph, dtype, device)
            self._codes.clear()
            self._sources.clear()
            self.regions.clear()
            self.inference.clear()

    def _region(self, graph: fx.Graph, code: Code) -> TrainingRegion | None:
        """Return what trains a part of the graph; parts with equal code and inputs of equal sizes share one."""
        if self._options is None or written_inputs(graph):
            return None
        inputs = [node for node in graph.nodes if node.op in ("get_attr", "placeholder")]
        key = (code, *(str(getattr(node.meta["val"], "shape", node.meta["val"])) for node in inputs))
        if key not in self.regions:
            self.regions[key] = TrainingRegion(graph, code, self.title, self._options)
        return self.regions[key]

    def _compiled(self, graph: fx.Graph) -> Code:
        return compile_graph(graph, self.title, self._sources)


def without_missing_inputs(
    graph: fx.Graph, signature: Signature, missing: frozenset[str]
) -> tuple[fx.Graph, tuple[bool, ...]]:
    """Return `graph` without the inputs in `missing`, and which output leaves remain.

    Raises:
        CallError: every output depends on a missing input.
    """
    past = missing & signature.cache_inputs
    if past:
        graph = without_cached_inputs(graph, past)
    if missing == past:
        return graph, (True,) * len(signature.output_keys)
    return without_inputs(graph, missing - past)


def build_outputs(spec: pytree.TreeSpec, leaves: list[Any], kept: tuple[bool, ...]) -> Any:
    """Return the model's output tree, without the outputs that depend on a missing input, as the model omits them.

    A dict or a tuple becomes shorter; any other class has None there.
    """
    result = pytree.tree_unflatten(leaves, spec)
    if all(kept) or type(result) not in (dict, tuple, list):
        return result
    flags = pytree.tree_unflatten(list(kept), spec)
    if type(result) is dict:
        return {key: value for key, value in result.items() if _is_kept(flags[key])}
    return type(result)(value for value, flag in zip(result, flags, strict=True) if _is_kept(flag))


def _is_kept(flags: Any) -> bool:
    leaves = pytree.tree_leaves(flags)
    return any(leaves) or not leaves
