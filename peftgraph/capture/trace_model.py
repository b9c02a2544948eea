"""pg.trace: a model and an example of its inputs become a program.

The model itself is never changed. A fake copy of it (a deep copy with fake tensors) is exported, in training mode, so
that dropout is traced, and in a marker dtype, so that literals that follow the parameters' dtype can be distinguished
from literals that do not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from peftgraph.capture.assumptions import extract_assumptions, require_all_used
from peftgraph.capture.cache_inputs import with_cached_tokens
from peftgraph.capture.calling_convention import derive_signature, input_symbols
from peftgraph.capture.compare_with_eager import Level, ModelMismatch, compare_with_model
from peftgraph.capture.diagnosis import explain, exporter_silenced
from peftgraph.capture.example_inputs import Example, bind_call, bind_example, with_distinct_batch
from peftgraph.capture.export_run import export_fake_copy, marker_dtypes
from peftgraph.capture.functionalise import functionalise_graph
from peftgraph.capture.host_classes import model_class_of, submodule_states
from peftgraph.capture.isolation import isolated_trace
from peftgraph.capture.merge_modes import merge_mode_graphs
from peftgraph.capture.mode_check import agrees_under_dtype, compare_modes
from peftgraph.capture.model_identity import NotIdentifiable, identity
from peftgraph.capture.normalise import normalise_graph
from peftgraph.capture.progress import Progress, no_progress
from peftgraph.capture.quantised_modules import codes_of_model, with_dequantised_projections, with_plain_projections
from peftgraph.capture.submodule import observe_calls, require_served
from peftgraph.capture.trace_cache import find_trace, store_trace
from peftgraph.capture.transformers_patches import patch_difference
from peftgraph.errors import TraceError
from peftgraph.ir.dtype_literals import convert_literals, record_literals
from peftgraph.ir.graphs import call_nodes, stored_tensor_nodes
from peftgraph.ir.interpreter import run_in_evaluation
from peftgraph.ir.ordering import record_order
from peftgraph.ir.program import ProgramData
from peftgraph.ir.quantised_base import StoredCodes, read_codes
from peftgraph.ir.shape_inference import (
    can_replace_dtype,
    fake_like,
    fake_mode_of,
    infer_values,
    replace_dtype,
    with_concrete_sizes,
)
from peftgraph.ir.signature import Signature
from peftgraph.ir.source_model import EnclosingModel
from peftgraph.ir.tensor_table import TensorEntry, TensorTable


@dataclass(frozen=True)
class Options:
    """How to trace.

    Attributes:
        fixed: axes whose sizes stay the example's, by the name of an input.
        assume: the truth that tensors have at lines of the model's code that branch by it.
        verify: how far the program is compared with the model: "off", "example" or "sizes".
        progress: told how far the trace is.
        cache: a folder with the programs of earlier traces; None to trace anew.
    """

    fixed: Mapping[str, Sequence[int]] = field(default_factory=dict)
    assume: Mapping[str, bool] = field(default_factory=dict)
    verify: Level = "sizes"
    progress: Progress = no_progress
    cache: Path | None = None


def capture(
    model: nn.Module, example: Mapping[str, Any] | tuple[Any, ...] | Tensor, options: Options = Options()
) -> ProgramData:
    """Trace `model` into a program.

    Args:
        model: any module; its weights may be on the meta device. It is not modified, and its tensors are
            shared, not copied.
        example: a dict of keyword inputs or a tuple of positional ones. Sizes of the batch and of sequences
            become symbols.
        options: how to trace it.

    Raises:
        TraceError: the model cannot be traced; the message names the line of its code and what to change.
    """
    with isolated_trace(model):
        coded = codes_of_model(model)
        return _capture_quantised(model, example, options, coded) if coded else _captured(model, example, options)[1]


def _captured(
    model: nn.Module, example: Mapping[str, Any] | tuple[Any, ...] | Tensor, options: Options
) -> tuple[Example, ProgramData]:
    table = _table_of(model)
    given = _with_options(bind_example(model, example), options)
    key = _key_in_cache(model, given, options)
    bound, program = _from_cache(model, given, table, options, key) or _traced_for_cache(
        model, given, table, options, key
    )
    return bound, replace(program, model_class=model_class_of(model), submodules=submodule_states(model))


def _key_in_cache(model: nn.Module, given: Example, options: Options) -> str:
    """Return the key of a trace; "" where it cannot be kept."""
    if options.cache is None or options.assume:
        return ""
    options.progress("looking for an earlier trace", 0, 0)
    try:
        return identity(model, given, {"verify": options.verify})
    except NotIdentifiable as reason:
        options.progress(f"not kept for later, since it depends on {reason}", 0, 0)
        return ""


def _from_cache(
    model: nn.Module, given: Example, table: TensorTable, options: Options, key: str
) -> tuple[Example, ProgramData] | None:
    found = find_trace(options.cache, key) if options.cache is not None and key else None
    if found is None:
        return None
    bound = with_distinct_batch(given) if found.distinct else given
    try:
        with exporter_silenced():
            return bound, found.program(model, bound, table)
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError):  # what reading a damaged file ends in
        return None


def _traced_for_cache(
    model: nn.Module, given: Example, table: TensorTable, options: Options, key: str
) -> tuple[Example, ProgramData]:
    bound, program = _with_best_batch(
        model, given, table, options, lambda one: with_cached_tokens(model, one, table.dtype)
    )
    if options.cache is not None and key:
        distinct = [one.shape for one in bound.tensors] != [one.shape for one in given.tensors]
        reason = store_trace(options.cache, key, program, distinct)
        if reason:
            options.progress(f"not kept for later: {reason}", 0, 0)
    return bound, program


def _capture_quantised(
    model: nn.Module,
    example: Mapping[str, Any] | tuple[Any, ...] | Tensor,
    options: Options,
    coded: Mapping[str, StoredCodes],
) -> ProgramData:
    """Traces a model that holds quantised projections: one with plain ones, whose weights are codes."""
    bound, program = _captured(with_plain_projections(model, coded), example, replace(options, verify="off"))
    program = program.evolve(table=read_codes(program.graph, program.table, coded))
    return compare_with_model(with_dequantised_projections(model, coded), program, bound, options.verify)


def capture_part(
    model: nn.Module,
    example: Mapping[str, Any] | tuple[Any, ...] | Tensor,
    root: str,
    options: Options = Options(),
) -> ProgramData:
    """Trace the submodule `root` of `model` into a program; names and tensors are those of the whole model.

    Args:
        model: any module; it is not modified. A copy of it that shares its parameters is run on `example`.
        example: a call of the whole model.
        root: the dotted name of a submodule. It is traced on the first call that it gets.
        options: how to trace it; inputs are those of the submodule.

    Raises:
        TraceError: there is no such submodule, it is not called or in several ways, or it cannot be traced.
    """
    if codes_of_model(model):
        raise TraceError(f"{type(model).__name__} holds quantised projections; trace it as a whole, without root.")
    with isolated_trace(model):
        options.progress(f"running the model, to see how {root} is called", 0, 0)
        around, outer, seen = observe_calls(model, root, example)
        part, table = model.get_submodule(root), _table_of(model)
        own = _table_of(part)
        if own.dtype != table.dtype:
            raise TraceError(f"{root} is {own.dtype} in a model that is {table.dtype}. Convert one of them first.")
        given = _with_options(bind_call(part, seen[0].args, seen[0].kwargs), options)
        _, program = _with_best_batch(part, given, own, options)
        require_served(program.signature, root, seen)
        constants = {name: entry for name, entry in program.table.items() if entry.kind == "constant"}
        _prefix(program.graph, root, constants)
        whole = EnclosingModel(around, root, outer.assumed)
        return replace(program, model=type(model).__name__, table=table.updated(constants), enclosing_model=whole)


def _with_options(example: Example, options: Options) -> Example:
    return replace(example.with_fixed(options.fixed), assume=dict(options.assume))


def _with_best_batch(
    model: nn.Module,
    given: Example,
    table: TensorTable,
    options: Options,
    completed: Callable[[Example], Example] = lambda one: one,
) -> tuple[Example, ProgramData]:
    """Choose the example to trace with, and trace it: with a batch that equals no other size, or the example's own
    where the model's code fixes the batch (for example by a loop over it)."""
    bound = completed(with_distinct_batch(given))
    program = _compared(model, bound, table, options, lambda signature: _takes(signature, given))
    if program is None:
        bound = completed(given)
        program = _compared(model, bound, table, options)
    assert program is not None
    return bound, program


def _compared(
    model: nn.Module,
    bound: Example,
    table: TensorTable,
    options: Options,
    serves: Callable[[Signature], bool] = lambda signature: True,
) -> ProgramData | None:
    """Return the program of a call, compared with the model; None, without a comparison, if its signature does not fit.

    Where it differs from the model under another dtype than the model's own, that dtype is the first suspect.
    """
    markers = marker_dtypes(model, table.dtype)
    program = _in_both_modes(model, bound, table, markers, options.progress)
    if not serves(program.signature):
        return None
    require_all_used(options.assume, program.signature.assumptions)
    options.progress("comparing the program with the model", 0, 0)
    try:
        return compare_with_model(model, program, bound, options.verify)
    except ModelMismatch:
        if not program.can_change_dtype or markers[0] == table.dtype:
            raise
        program = _in_both_modes(model, bound, table, [None], options.progress)
        return compare_with_model(model, program, bound, options.verify)


def _takes(signature: Signature, given: Example) -> bool:
    sizes = {leaf.key: leaf.value.shape for leaf in given.leaves if isinstance(leaf.value, Tensor)}
    fixed = [(spec.dims[0], sizes[spec.key][0]) for spec in signature.inputs if spec.dims and spec.key in sizes]
    return all(isinstance(size, str) or size == own for size, own in fixed)


def _prefix(graph: fx.Graph, root: str, constants: Mapping[str, TensorEntry]) -> None:
    """Give tensors and module paths, in place, the names they have in the whole model."""
    for node in graph.nodes:
        if node.op == "get_attr" and node.target not in constants:
            node.target = f"{root}.{node.target}"
        stack = node.meta.get("nn_module_stack")
        if stack:
            paths = {key: (f"{root}.{path}" if path else root, cls) for key, (path, cls) in stack.items()}
            node.meta["nn_module_stack"] = paths


def _program(model: str, traced: _Traced, bound: Example) -> ProgramData:
    record_order(traced.graph)
    return ProgramData(
        model=model,
        graph=traced.graph,
        table=traced.table,
        signature=traced.signature,
        example=bound.tensors,
        can_change_dtype=traced.marker is not None,
    )


def _in_both_modes(
    model: nn.Module, bound: Example, table: TensorTable, markers: Sequence[torch.dtype | None], progress: Progress
) -> ProgramData:
    progress("comparing training with evaluation", 0, 0)
    look = compare_modes(model, bound)

    @cache
    def faithful(marker: torch.dtype) -> bool:
        return agrees_under_dtype(model, bound, table.dtype, marker, look)

    traced = _trace(model, bound, table, progress, training=True, markers=markers, faithful=faithful)
    if not look.agree:
        evaluation = _trace(model, bound, table, progress, training=False, markers=[traced.marker])
        traced = _with_evaluation(model, traced, evaluation)
    if traced.patched:
        progress("comparing the patched model with its own code", 0, 0)
        reason = patch_difference(
            model, bound, run_in_evaluation(_program(type(model).__name__, traced, bound), bound.tensors)
        )
        if reason is not None:
            raise TraceError(f"{type(model).__name__} cannot be traced as it stands, and {reason}.")
    return _program(type(model).__name__, traced, bound)


@dataclass(frozen=True)
class _Traced:
    """What a model does in one mode; without a marker no literal follows. `patched`: see Exported."""

    graph: fx.Graph
    table: TensorTable
    signature: Signature
    marker: torch.dtype | None
    patched: bool


def _trace(
    model: nn.Module,
    bound: Example,
    table: TensorTable,
    progress: Progress,
    *,
    training: bool,
    markers: Sequence[torch.dtype | None],
    faithful: Callable[[torch.dtype], bool] = lambda marker: True,
) -> _Traced:
    exported = export_fake_copy(model, bound, table.dtype, training, markers, progress, faithful)
    progress("normalising", 0, 0)
    table = table.updated(exported.constants)
    marker = exported.marker
    graph = normalise_graph(exported.program, _names_of_ties(model), exported.functions)
    if marker is not None:
        _cast_numbers(graph, exported.constants, marker)
        record_literals(graph, marker)
    symbols = input_symbols(graph)
    try:
        _restore_dtype(graph, table, bound, marker)
    except Exception as error:
        raise explain(model, error) from error
    assumptions = extract_assumptions(graph, exported.asked, table)
    used = {str(node.target) for node in stored_tensor_nodes(graph)}
    table = TensorTable((name, entry) for name, entry in table.items() if entry.kind != "constant" or name in used)
    signature = derive_signature(graph, exported, bound, symbols, assumptions)
    functionalise_graph(graph)
    return _Traced(graph, table, signature, marker, exported.patched)


def _cast_numbers(graph: fx.Graph, constants: Mapping[str, TensorEntry], marker: torch.dtype) -> None:
    """Cast the tensor literals that the model's code made in its own dtype, so that they follow it. One that is a limit
    of that dtype is filled in instead, since a cast could exceed the limits of another dtype."""
    info = torch.finfo(marker)
    for node in list(stored_tensor_nodes(graph)):
        entry = constants.get(str(node.target))
        if entry is None or entry.tensor.dtype != marker:
            continue
        limit = entry.tensor.item() if entry.tensor.dim() == 0 else None
        with graph.inserting_after(node):
            if limit in (info.min, info.max, info.tiny, info.eps):
                kind = {"dtype": marker, "device": entry.tensor.device}
                cast = graph.call_function(torch.ops.aten.full.default, ([], limit), kind)
            else:
                cast = graph.call_function(torch.ops.aten.to.dtype, (node, marker))
        cast.meta = dict(node.meta)
        node.replace_all_uses_with(cast, delete_user_cb=lambda user, cast=cast: user is not cast)


def _with_evaluation(model: nn.Module, training: _Traced, evaluation: _Traced) -> _Traced:
    """Return one graph for both modes.

    Raises:
        TraceError: the inputs or the outputs differ, or the graphs cannot be merged.
    """
    ours, theirs = training.signature, evaluation.signature
    if ours.outputs != theirs.outputs:
        differing = ", ".join(sorted(set(ours.output_keys) ^ set(theirs.output_keys))) or "in their types"
        raise TraceError(
            f"The outputs differ in training and in evaluation: {differing}. Switch it off with an argument in the "
            "example or in the model's configuration, or trace a part of the model."
        )
    if [spec.dims for spec in ours.inputs] != [spec.dims for spec in theirs.inputs]:
        raise TraceError(
            f"The model's code takes {ours.describe()} in training and {theirs.describe()} in evaluation; a program "
            "has one set of sizes. Trace a part of the model."
        )
    names, added = {}, {}
    for name, entry in evaluation.table.items():
        if entry.kind == "constant":
            names[name] = f"evaluation_{name}"
            added[names[name]] = entry
    conditions = tuple(dict.fromkeys((*ours.conditions, *theirs.conditions)))
    signature = replace(ours, conditions=conditions, assumptions=(*ours.assumptions, *theirs.assumptions))
    graph = merge_mode_graphs(training.graph, evaluation.graph, names)
    try:
        with exporter_silenced():
            infer_values(call_nodes(graph), fake_mode_of(graph))
    except Exception as error:  # whatever an operator says of sizes that each mode knows in symbols of its own
        raise TraceError(
            f"{type(model).__name__} computes with other sizes in training than in evaluation ({error}); a program has "
            "one set of sizes. If it drops tokens in training, set the rate to 0; or trace a part of the model: "
            'pg.trace(model, example, root="...").'
        ) from error
    patched = training.patched or evaluation.patched
    return replace(training, graph=graph, table=training.table.updated(added), patched=patched, signature=signature)


def _table_of(model: nn.Module) -> TensorTable:
    frozen: dict[int, Tensor] = {}
    entries: dict[str, TensorEntry] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tensor = frozen.setdefault(id(parameter), parameter.detach())
        entries[name] = TensorEntry(tensor, "parameter")
    for prefix, module in model.named_modules(remove_duplicate=False):  # a module of several names is one of each
        for name, buffer in module._buffers.items():
            if buffer is not None:
                full = f"{prefix}.{name}" if prefix else name
                persistent = name not in module._non_persistent_buffers_set
                entries[full] = TensorEntry(frozen.setdefault(id(buffer), buffer.detach()), "buffer", persistent)
    return TensorTable(entries)


def _names_of_ties(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return, for every name of a tied tensor (the exporter keeps any one of them), all its names, that one first."""
    groups: dict[int, list[str]] = {}
    stored = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in stored:
        groups.setdefault(id(tensor), []).append(name)
    return {name: (name, *(n for n in names if n != name)) for names in groups.values() for name in names}


def _restore_dtype(graph: fx.Graph, table: TensorTable, bound: Example, marker: torch.dtype | None) -> None:
    """Convert a graph traced under `marker` to the dtype of the model's own weights."""
    convert_literals(graph, table.dtype, None)
    mode = fake_mode_of(graph)
    tensors = iter(bound.tensors)
    for node in graph.nodes:
        if node.op == "placeholder":
            value = node.meta["val"]
            node.meta["val"] = (
                with_concrete_sizes(mode, value, next(tensors).dtype) if isinstance(value, Tensor) else value
            )
        elif node.op == "get_attr":
            node.meta["val"] = fake_like(mode, table[str(node.target)].tensor)
    with exporter_silenced():
        both = (marker, table.dtype) == (torch.bfloat16, torch.float32)  # which promote alike
        if both and can_replace_dtype(call_nodes(graph)):
            replace_dtype(call_nodes(graph), mode, torch.bfloat16, torch.float32)
        else:
            infer_values(call_nodes(graph), mode)
