"""Removing passes: Program in, Program out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import fx

from peftgraph.errors import PeftGraphError
from peftgraph.ir.builder import enlarge_size, erase_nodes
from peftgraph.ir.dead_code import WRITE_DISABLED
from peftgraph.ir.edits import Edit, EditLog
from peftgraph.ir.graphs import copy_graph
from peftgraph.ir.inputs_of_edits import drop_outputs, with_inputs_of_edits
from peftgraph.ir.ordering import in_canonical_order, infer_changed_values
from peftgraph.ir.program import AppliedPass, ProgramData
from peftgraph.ir.quantised import COMPUTES_IN
from peftgraph.ir.shape_inference import ShapeInference, fake_mode_of, same_metadata
from peftgraph.ir.tensor_table import TensorEntry
from peftgraph.ir.verifier import verify
from peftgraph.rewrite.apply import apply
from peftgraph.rewrite.sequence.size_constraints import update_size_constraints
from peftgraph.sites import Sites

P = TypeVar("P", bound=ProgramData)


def remove(program: P, sites: Sites, which: int) -> P:
    """Return the program without the pass at index `which` of its history; the other passes keep their parameters.

    Where later passes were built on what the removed one computes, they are applied again without it.

    Raises:
        PeftGraphError: a later pass cannot be applied without it.
    """
    if not _has_dependents(program, which):
        return _taken_out(program, which)
    removed, later = program.history[which].method, program.history[which + 1 :]
    try:
        return reapply(program, sites, which, later)
    except PeftGraphError as error:
        others = " and ".join(str(applied.method) for applied in later)
        raise PeftGraphError(
            f"{removed} cannot be removed alone, for {others} came after it, and without it: {error} Remove what came "
            "after it first."
        ) from error


def reapply(program: P, sites: Sites, start: int, passes: Sequence[AppliedPass]) -> P:
    """Return the program with other passes in the place of those from index `start` of its history on; parameters of
    the same name are kept."""
    result = program
    for which in reversed(range(start, len(program.history))):
        result = _taken_out(result, which)
    with torch.random.fork_rng(devices=[]):  # initial values are replaced: the user's generator stays put
        for applied in passes:
            result = apply(result, sites, (applied.method,), applied.dtype)
    kept = (name for name, entry in result.table.items() if entry.added or entry.base_tensor is not None)
    return result.evolve(
        table=result.table.updated({name: program.table[name] for name in kept if name in program.table})
    )


def _has_dependents(program: ProgramData, which: int) -> bool:
    """Tell whether later passes may have built on sizes that a pass changed, or read values of its own that it did not
    put in the place of others."""
    if which == len(program.history) - 1:
        return False
    if any(rule.join.resizes for rule in program.history[which].method.rules()):
        return True
    own = {name for edit in program.edits if edit.application == which for name in edit.nodes}
    inner = own - {move.after for edit in program.edits if edit.application == which for move in edit.moves}
    later = {name for edit in program.edits if edit.application > which for name in edit.nodes}
    return any(user.name in later for node in program.graph.nodes if node.name in inner for user in node.users)


def _taken_out(program: P, which: int) -> P:
    """Return the program without the edits of one pass that no later one was built on."""
    graph = copy_graph(program.graph)
    table, inference = program.table, ShapeInference(fake_mode_of(graph))
    gone = [edit for edit in program.edits if edit.application == which]
    edits = EditLog(program.edits)
    names = {node.name: node for node in graph.nodes}
    for edit in reversed(gone):
        moved = [(names[move.after].meta["val"], edits.value_after_removal(move)) for move in edit.moves]
        undo(graph, names, edits, edit)
        edits.remove(edit)
        resized = [
            names[previous] for value, previous in moved if not same_metadata(value, names[previous].meta["val"])
        ]
        infer_changed_values(graph, resized, inference, {names[one.node] for one in edit.size_increases})
    made = {name for edit in gone for name in edit.parameters}
    table = table.updated({name: _before(table[name]) for name in made if not table[name].added})
    table = table.updated({name: _before(table[name]) for edit in gone for name in edit.rewritten if name in table})
    table = table.updated({name: _unquantised(name, table[name]) for edit in gone for name in edit.quantised})
    table = table.without(name for name in made if table[name].added)
    kept = tuple(replace(e, application=e.application - (e.application > which)).pruned(names) for e in edits)
    history = program.history[:which] + program.history[which + 1 :]
    used = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    table = table.without(name for name, entry in table.items() if entry.added and name not in used)
    if not history:
        table = table.updated({name: _before(table[name]) for name in table.state})
    changed = program.evolve(graph=in_canonical_order(graph), table=table, edits=kept, history=history)
    result = update_size_constraints(with_inputs_of_edits(changed))
    verify(result, program, inference)
    return result


def undo(graph: fx.Graph, names: dict[str, fx.Node], edits: EditLog, edit: Edit) -> None:
    """Take one edit out of `graph` and its `names`, in place: its users get back the value that it replaced."""
    for move in edit.moves:
        previous = edits.value_after_removal(move)
        users = [user for user in names[move.after].users if user.name not in edit.nodes]
        for user in users:
            user.replace_input_with(names[move.after], names[previous])
    for one in edit.size_increases:
        enlarge_size(names[one.node], one, -1)
    for name in edit.disabled_writes:
        del names[name].meta[WRITE_DISABLED]
    for name in edit.narrowed:
        del names[name].meta[COMPUTES_IN]
    if edit.cached:
        drop_outputs(graph, {one.output for one in edit.cached})
    gone = dict.fromkeys(names[name] for name in edit.nodes)
    reader = next((user for node in gone for user in node.users if user not in gone), None)
    assert reader is None, f"the edit at {edit.site} is still read by %{reader}"
    for node in gone:
        del names[node.name]
    erase_nodes(graph, gone)


def _before(entry: TensorEntry) -> TensorEntry:
    assert entry.base_tensor is not None
    return replace(entry, tensor=entry.base_tensor, trainable=False, base_tensor=None)


def _unquantised(name: str, entry: TensorEntry) -> TensorEntry:
    """Return the entry of a quantised weight as it was before.

    Raises:
        PeftGraphError: only its codes are known.
    """
    if entry.base_tensor is None:
        raise PeftGraphError(
            f"The weight {name} is known by its codes alone, so that what it was before quantisation cannot be given "
            'back. Trace the model anew, or take the dequantised weights: pg.fold(program, quantised="dequantise").'
        )
    return replace(entry, tensor=entry.base_tensor, base_tensor=None, quantised=None)
