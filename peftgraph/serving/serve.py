"""Makes one program of many adapters of a base."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from peftgraph.errors import AdapterError, Conflict, PeftGraphError
from peftgraph.interop.fingerprint import fingerprint, first_difference
from peftgraph.ir.added_inputs import add_placeholder, batch_dim, inputs_of, with_added_input
from peftgraph.ir.builder import scales_as_tensors
from peftgraph.ir.edits import AddedInput
from peftgraph.ir.graphs import copy_graph, find_node
from peftgraph.ir.interpreter import evaluation_run, float64_run
from peftgraph.ir.ordering import in_canonical_order, infer_changed_values
from peftgraph.ir.program import ProgramData
from peftgraph.ir.shape_inference import ShapeInference, fake_mode_of
from peftgraph.ir.verifier import verify
from peftgraph.rewrite.apply import apply
from peftgraph.rewrite.finalize import finalize, has_final_form
from peftgraph.serving.combined_graph import CombinedGraph
from peftgraph.serving.prompts import AdapterPrompt, PromptTable
from peftgraph.serving.row_part import RowPart
from peftgraph.serving.stacks import Stacks, TrainedStacks
from peftgraph.sites import Sites

P = TypeVar("P", bound=ProgramData)
Load = Callable[[str, Any], RowPart]
INPUT = "adapter_ids"
CHECKED = 32  # so many adapters, at most, are compared with themselves alone
SMALL = 50_000_000  # up to so many values, that is done in float64


@dataclass
class Group:
    """Adapters whose rows one set of calls computes.

    Attributes:
        key: what their graphs have in common.
        stacks: their values.
        exact: whether sizes cannot be padded with zeros.
    """

    key: Any
    stacks: Stacks
    exact: bool = False

    def takes(self, part: RowPart) -> bool:
        """Tell whether another adapter can be one of the group."""
        return self.key == part.key and (not self.exact or self.stacks.has_shapes_of(part))


@dataclass(frozen=True)
class ServedAdapters:
    """The adapters that a program holds.

    Attributes:
        numbers: of each adapter, from 1, by name.
        groups: of adapters with equal graphs.
        sources: what each is loaded from, by name.
        capacity: how many numbers there are.
        load: returns the part of an adapter, from its name and a program or directory.
        parameters: the names of the parameters that train for each adapter, by its name; none where they are values.
        prompts: the rows before the tokens, if some adapters have any.
    """

    numbers: Mapping[str, int]
    groups: Sequence[Group]
    sources: Mapping[str, Any]
    capacity: int
    load: Load
    parameters: Mapping[str, Sequence[str]] = field(default_factory=dict[str, Sequence[str]])
    prompts: PromptTable | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> ServedAdapters:
        return self


def serve(
    base: P, sites: Sites, adapters: Mapping[str, Any], load: Load, slots: int | None, trainable: bool = False
) -> P:
    """Return a program that computes each row of a batch with an adapter of its own.

    Args:
        base: what all of them adapt.
        sites: of the base, and of the adapters' patterns.
        adapters: by name, what `load` takes.
        load: returns the part of an adapter.
        slots: for how many adapters of each graph there is room; by default as many as there are. If there are more,
            the first ones are loaded, and others when rows name them.
        trainable: whether the adapters' own parameters are in the graph, to train.

    Raises:
        AdapterError: an adapter is one of another base.
        Conflict: adapters cannot be in one graph.
    """
    if not adapters:
        raise AdapterError("serve() needs at least one adapter.")
    if base.enclosing_model is not None:
        raise Conflict(
            "A program of a part of a model (root=) takes the calls of the whole model, which names no adapters. Trace "
            "the whole model to serve several."
        )
    if slots is not None and slots < 1:
        raise PeftGraphError(f"slots must be at least 1, got {slots}.")
    if slots is not None and trainable:
        raise PeftGraphError("slots are for adapters that are loaded later; those that train are all here.")
    room = len(adapters) if slots is None else slots
    parts = {name: load(name, one) for name, one in list(adapters.items())[:room]}
    try:
        return _checked(_combined(base, sites, parts, adapters, load, slots, trainable, apart=False), parts)
    except _Differs:  # a size that cannot be padded
        return _checked(_combined(base, sites, parts, adapters, load, slots, trainable, apart=True), parts, last=True)


def adapter_part(name: str, base: ProgramData, sites: Sites, adapter: ProgramData, trainable: bool = False) -> RowPart:
    """Return what an adapter computes for rows, with its scales as tensors.

    Args:
        name: of the adapter, for messages.
        base: may have passes, which the adapter has too.
        sites: of the base, and of the adapter's patterns.
        adapter: the base with further passes.
        trainable: whether it will train, so that what its parameters alone decide stays computed.

    Raises:
        AdapterError: it is an adapter of another base, or none.
        Conflict: it cannot be in a graph with others.
    """
    shared = len(base.history)
    if len(adapter.history) <= shared:
        raise AdapterError(f"{name!r} has no passes, so it is no adapter.")
    _check_base(name, base, adapter)
    adapter = adapter if trainable else _final(adapter, sites)
    form: ProgramData = base
    prompt = _prompt(name, adapter, shared)
    token = scales_as_tensors.set(True)
    try:
        with torch.random.fork_rng(devices=[]):
            for applied in adapter.history[shared:]:
                if prompt is not None and applied.method.prompt_rows() is not None:
                    continue
                form = apply(form, sites, (applied.method,), applied.dtype)
    finally:
        scales_as_tensors.reset(token)
    ones = frozenset(n for n, e in form.table.items() if e.added and e.tensor.dim() and bool((e.tensor == 1).all()))
    kept = {n for n, e in form.table.items() if base.table.get(n) is not e}
    values = {n: adapter.table[n] for n in kept if n in adapter.table}
    part = RowPart.of(form.evolve(table=form.table.updated(values)), base, ones)
    part.adapter, part.prompt = adapter, prompt
    if prompt is not None and trainable:
        raise Conflict(f"{name!r}: {prompt.method} trains alone; the rows of a batch have one length each there.")
    return part


def _prompt(name: str, adapter: ProgramData, shared: int) -> AdapterPrompt | None:
    """Return the rows before the tokens that an adapter has.

    Raises:
        Conflict: it has several.
    """
    found: list[AdapterPrompt] = []
    for i, applied in enumerate(adapter.history[shared:], shared):
        rows = applied.method.prompt_rows()
        if rows is not None:
            names = [one for edit in adapter.edits if edit.application == i for one in edit.parameters]
            found += [AdapterPrompt(rows, str(applied.method), adapter.table[one].tensor.detach()) for one in names]
    if len(found) > 1:
        raise Conflict(f"{name!r} prepends rows in {len(found)} places; one graph for many adapters has one.")
    return found[0] if found else None


def _final(adapter: P, sites: Sites) -> P:
    """Return an adapter with the values that its parameters alone decide as parameters, where it has such."""
    return finalize(adapter, sites) if has_final_form(adapter, sites) else adapter


def _check_base(name: str, base: ProgramData, adapter: ProgramData) -> None:
    own, base = adapter.base or adapter, base.base or base
    if own is base:
        return
    difference = first_difference(fingerprint(own), base)
    if difference is not None:
        raise AdapterError(f"{name!r} is an adapter of another base: {difference}.")
    for key, entry in own.table.items():
        other = base.table[key].tensor
        same = entry.tensor is other or entry.tensor.data_ptr() == other.data_ptr() or torch.equal(entry.tensor, other)
        if entry.kind == "parameter" and not same:
            raise AdapterError(
                f"{name!r} is an adapter of a base with other weights: {key} differs. Save it and serve the directory, "
                "if that is what you want."
            )


def _combined(
    base: P,
    sites: Sites,
    parts: Mapping[str, RowPart],
    sources: Mapping[str, Any],
    load: Load,
    slots: int | None,
    trainable: bool,
    apart: bool,
) -> P:
    """Return a program of all adapters; those of other shapes have calls of their own if `apart`."""
    numbers = {name: i for i, name in enumerate(sources, 1)}
    capacity = len(numbers) + (slots or 0)
    grouped: dict[Any, list[str]] = {}
    for name, part in parts.items():
        shapes = tuple(tuple(node.meta["val"].shape) for node in part.parameters) if apart else ()
        grouped.setdefault((part.key, shapes), []).append(name)
    extended = _with_ids(base, len(numbers), _added_inputs(base, parts))
    prompts = {numbers[name]: part.prompt for name, part in parts.items() if part.prompt is not None}
    table = PromptTable(prompts, capacity) if prompts else None
    if table is not None:
        extended = extended.evolve(table=extended.table.updated(table.entries()))
        object.__setattr__(extended, "base", extended)
        extended = apply(extended, sites, (table.method(INPUT),))
    graph = copy_graph(extended.graph)
    whole = CombinedGraph(graph, ShapeInference(fake_mode_of(graph)), find_node(graph, INPUT))
    whole.follow(extended.edits[len(base.edits) :])
    groups: list[Group] = []
    for number, ((key, _), names) in enumerate(grouped.items()):
        room = max(len(names), slots or 0)
        label = f"adapters{number or ''}"
        own, ids = [parts[one] for one in names], [numbers[one] for one in names]
        stacks = (
            TrainedStacks(own, ids, capacity, room, label, extended.table, names=names)
            if trainable
            else Stacks(own, ids, capacity, room, label, extended.table)
        )
        whole.add(parts[names[0]], stacks, number)
        groups.append(Group(key, stacks, apart))
    infer_changed_values(graph, whole.resized, whole.inference)
    ordered = in_canonical_order(graph)
    trained = {
        name: own
        for one in groups
        if isinstance(one.stacks, TrainedStacks)
        for name, own in one.stacks.parameters.items()
    }
    served = ServedAdapters(numbers, groups, sources, capacity, load, trained, table)
    program = extended.evolve(graph=ordered, table=extended.table.updated(whole.entries), served=served)
    verify(program)
    return program


def _with_ids(base: P, count: int, inputs: Iterable[AddedInput]) -> P:
    """Return a program with further inputs and the one that names each row's adapter, as a base of its own."""
    graph, batch = copy_graph(base.graph), batch_dim(base.signature)
    base = base.evolve(graph=graph)
    for one in inputs:
        add_placeholder(graph, base.signature, one)
        base = with_added_input(base, one)
    added = AddedInput(INPUT, (batch,), torch.int64, 0)
    add_placeholder(graph, base.signature, added)
    rows = next(
        int(value.shape[0])
        for spec, value in zip(base.signature.inputs, base.example, strict=True)
        if spec.dims and spec.dims[0] == batch
    )
    example = torch.arange(rows, device=base.example[0].device) % (count + 1)
    extended = with_added_input(base, added, example)
    object.__setattr__(extended, "base", extended)
    return extended


def _added_inputs(base: ProgramData, parts: Mapping[str, RowPart]) -> list[AddedInput]:
    """Return the inputs that the adapters' passes added to the base.

    Raises:
        Conflict: two adapters ask for other inputs of one name.
    """
    found: dict[str, tuple[AddedInput, str]] = {}
    for name, part in parts.items():
        for one in inputs_of(part.program.edits):
            known, other = found.setdefault(one.name, (one, name))
            if known != one:
                raise Conflict(f"{name!r} reads the input {one}, and {other!r} {known}; they cannot be in one program.")
    return [one for one, _ in found.values() if one not in inputs_of(base.edits)]


class _Differs(Exception):
    """Rows of an adapter are not what it computes alone."""


def _checked(program: P, parts: Mapping[str, RowPart], last: bool = False) -> P:
    """Return the program once its rows are what each adapter computes alone.

    Raises:
        Conflict: they are not.
    """
    if program.table.device.type == "meta":
        return program
    total = sum(entry.tensor.numel() for entry in program.table.values())
    half = program.table.dtype in (torch.bfloat16, torch.float16)  # whose own rounding float64 does not repeat
    prepare, bound = (float64_run, 1e-6) if total <= SMALL and not half else (evaluation_run, 5e-2 if half else 1e-3)
    run = prepare(program)
    own = program.examples
    for name in _representatives(program, parts):
        assert program.served is not None
        ids = torch.full_like(program.example[-1], program.served.numbers[name])
        alone = _alone(parts[name])
        given = [own[one] for one in alone.examples]
        found, wanted = run([*program.example[:-1], ids]), prepare(alone)(given)
        worst = max(map(_distance, found, wanted), default=0.0)
        if not worst <= bound:
            if not last:
                raise _Differs
            raise Conflict(
                f"{name!r} ({parts[name].method}) computes other values in a batch with others than alone (relative "
                f"difference {worst:.1e}): its rows depend on more than their own entries of the batch."
            )
    return program


def _alone(part: RowPart) -> ProgramData:
    assert part.adapter is not None
    return part.adapter


def _representatives(program: ProgramData, parts: Mapping[str, RowPart]) -> list[str]:
    """Return the adapters to check: one of each graph and of each set of shapes first, and at most CHECKED."""
    first: dict[Any, str] = {}
    for name, part in parts.items():
        first.setdefault((part.key, tuple(tuple(n.meta["val"].shape) for n in part.parameters)), name)
    rest = [name for name in parts if name not in first.values()]
    return [*first.values(), *rest][: max(CHECKED, len(first))]


def _distance(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        return float("inf")
    if not a.is_floating_point():
        return float(not torch.equal(a, b))
    largest = b.abs().max().clamp(min=1e-30) if b.numel() else torch.ones(())
    return float((a - b).abs().max() / largest) if b.numel() else 0.0
