"""Size constraints: the sizes that inputs may have once passes have prepended rows to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar, cast

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from peftgraph.ir.edits import EditLog
from peftgraph.ir.interpreter import fake_table, run_in_evaluation
from peftgraph.ir.program import ProgramData
from peftgraph.ir.shape_inference import example_size
from peftgraph.ir.signature import SizeCondition

P = TypeVar("P", bound=ProgramData)


def update_size_constraints(program: P) -> P:
    """Return the program with the sizes that its inputs may have: rows that a pass prepends count towards the
    largest."""
    base, lengths = program.base or program, program.prepended_lengths()
    ranges = {dim: _room(program, dim, span, lengths.get(dim, 0)) for dim, span in base.signature.ranges.items()}
    conditions = tuple(moved for one in base.signature.conditions for moved in _moved(program, one, lengths))
    if (ranges, conditions) == (program.signature.ranges, program.signature.conditions):
        return program
    return program.evolve(signature=replace(program.signature, ranges=ranges, conditions=conditions))


def _moved(program: ProgramData, one: SizeCondition, lengths: Mapping[str, int]) -> list[SizeCondition]:
    """Return a condition on sizes as they arrive at the model's line, and as they are where the model reads both."""
    more = tuple(lengths.get(dim, 0) for dim in one.sizes)
    if not any(more):
        return [one]
    as_it_is = any(n > 0 and _is_read_as_it_is(program, dim) for dim, n in zip(one.sizes, more, strict=True))
    return [replace(one, offsets=more), *([one] if as_it_is else [])]


def _room(program: ProgramData, dim: str, span: tuple[int, int | None], more: int) -> tuple[int, int | None]:
    """Return the smallest and largest size of an input that grows by `more` on its way into the model.

    Where parts of the model go on reading it as it is, the limits may be theirs, such as a table of positions; then the
    largest size stands if the graph takes it.
    """
    low, high = span
    as_it_is = more > 0 and _is_read_as_it_is(program, dim)
    fits = high is not None and as_it_is and _takes(program, dim, high)
    return low if as_it_is else max(1, low - more), high if high is None or fits else high - more


def _is_read_as_it_is(program: ProgramData, dim: str) -> bool:
    edits = EditLog(program.edits)
    own = {name for edit in program.edits for name in edit.nodes}
    inputs = [spec.name for spec in program.signature.inputs if dim in spec.dims and edits.moves_at(spec.name)]
    return any(user.name not in own for name in inputs for user in program.node(name).users)


def _takes(program: ProgramData, dim: str, size: int) -> bool:
    """Tell whether the graph runs, on shapes alone, for inputs of that size; not known, and no, where values make
    sizes."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    shapes = {
        spec.name: [
            size if one == dim else cast("int", example_size(now))
            for one, now in zip(spec.dims, program.node(spec.name).meta["val"].shape, strict=True)
        ]
        for spec in program.signature.inputs
    }
    with mode:
        inputs = [torch.zeros(shapes[spec.name], dtype=spec.dtype) for spec in program.signature.inputs]
        try:
            run_in_evaluation(program.evolve(table=fake_table(program.table, mode)), inputs)
        except RuntimeError:  # what torch says of sizes that do not fit
            return False
    return True
