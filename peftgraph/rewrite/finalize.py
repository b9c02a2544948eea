"""Once training is over: values that depend on parameters alone become parameters, and what computed them goes."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from peftgraph.errors import PeftGraphError
from peftgraph.ir.interpreter import compute_node
from peftgraph.ir.modes import evaluation_graph
from peftgraph.ir.program import ProgramData
from peftgraph.rewrite.apply import apply, remove
from peftgraph.sites import Sites

P = TypeVar("P", bound=ProgramData)


def finalize(program: P, sites: Sites) -> P:
    """Return the program with every pass in its `finalized` form; values that passes computed become parameters.

    Raises:
        PeftGraphError: no pass computes anything from its parameters alone.
    """
    methods = [applied.method for applied in program.history]
    final = [method.finalized() for method in methods]
    if final == methods:
        raise PeftGraphError("There is nothing to finalise: no pass computes values from its parameters alone.")
    values = {name: entry.tensor.detach() for name, entry in program.table.items()}
    values |= derived_values(program)
    dtypes = [applied.dtype for applied in program.history]
    while program.history:
        program = remove(program, sites, 0)
    result = program
    with torch.random.fork_rng(devices=[]):  # initial values are overwritten: the user's generator stays put
        for method, dtype in zip(final, dtypes, strict=True):
            result = apply(result, sites, (method,), dtype)
    claimed = {name for edit in result.edits for name in edit.parameters}
    with torch.no_grad():
        for name in claimed.union(result.table.state):
            result.table[name].tensor.copy_(values[name])
    return result


def derived_values(program: ProgramData) -> dict[str, Tensor]:
    """Return the values that `Builder.mark_derived` marked, by the names they get as parameters."""
    nodes = [node for node in evaluation_graph(program.graph).nodes if "derived" in node.meta]
    return {node.meta["derived"]: compute_node(node, {}, program.table) for node in nodes}
