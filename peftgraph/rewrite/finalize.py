"""Once training is over: values that depend on parameters alone become parameters, and what computed them goes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from peftgraph.errors import PeftGraphError
from peftgraph.ir.interpreter import compute_node
from peftgraph.ir.modes import evaluation_graph
from peftgraph.ir.program import ProgramData
from peftgraph.rewrite.adapted_sites import adapted_sites
from peftgraph.rewrite.apply import apply
from peftgraph.rewrite.method import PassWithValues
from peftgraph.rewrite.remove import remove
from peftgraph.sites import Sites

P = TypeVar("P", bound=ProgramData)


def finalize(program: P, sites: Sites) -> P:
    """Return the program with every pass in the form it has after training, and the values that were computed.

    Raises:
        PeftGraphError: no pass has another form than the one it trains in.
    """
    final = [_final_form(program, sites, i) for i in range(len(program.history))]
    if all(one is None for one in final):
        raise PeftGraphError("There is nothing to finalise: no pass computes values from its parameters alone.")
    values = {name: entry.tensor.detach() for name, entry in program.table.items()}
    values |= derived_values(program)
    history = program.history
    while program.history:
        program = remove(program, sites, len(program.history) - 1)
    result = program
    with torch.random.fork_rng(devices=[]):  # initial values are overwritten: the user's generator stays put
        for applied, forms in zip(history, final, strict=True):
            for form in [PassWithValues(applied.method, {})] if forms is None else forms:
                result = apply(result, sites, (form.method,), applied.dtype)
                values |= {name: form.values[key] for name, key in _keys(result).items() if key in form.values}
    claimed = {name for edit in result.edits for name in edit.parameters}
    with torch.no_grad():
        for name in claimed.union(result.table.state):
            result.table[name].tensor.copy_(values[name])
    return result


def has_final_form(program: ProgramData, sites: Sites) -> bool:
    """Tell whether `finalize` has anything to do."""
    return any(_final_form(program, sites, i) is not None for i in range(len(program.history)))


def _final_form(program: ProgramData, sites: Sites, application: int) -> Sequence[PassWithValues] | None:
    """Return what a pass becomes after training; None where it stays as it is."""
    method = program.history[application].method
    found = method.finalized_from(sites, adapted_sites(program, sites, application, program.table.tensors()))
    if found is not None:
        return found
    return None if method.finalized() == method else [PassWithValues(method.finalized(), {})]


def _keys(program: ProgramData) -> dict[str, tuple[str, str]]:
    """Return (site, short name) of each parameter of the last pass, by full name."""
    last = len(program.history) - 1
    return {
        name: (edit.site, name.rpartition(".")[2])
        for edit in program.edits
        if edit.application == last
        for name in reversed(edit.parameters)
    }


def derived_values(program: ProgramData) -> dict[str, Tensor]:
    """Return the values that `Builder.mark_derived` marked, by the names they get as parameters."""
    nodes = [node for node in evaluation_graph(program.graph).nodes if "derived" in node.meta]
    return {node.meta["derived"]: compute_node(node, {}, program.table) for node in nodes}
