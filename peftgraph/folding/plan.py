"""Plans a fold on shapes, and computes it one parameter at a time when the parameter's values are available.

The engine runs on the meta device, which decides what folds and in which order; its steps are kept. The new value of a
parameter is computed by the steps that lead to it, from the stored values that they read.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeGuard

import torch
from torch import Tensor

from peftgraph.errors import NoFold
from peftgraph.folding.components import stored_tensor
from peftgraph.folding.engine import Folding
from peftgraph.folding.proof import Proof, check_finite, prove
from peftgraph.folding.steps import AcceptTrained, RecordingTable, Step, WriteWindows, slice_table
from peftgraph.ir.program import ProgramData
from peftgraph.ir.tensor_table import TensorEntry, TensorTable
from peftgraph.ir.verifier import verify
from peftgraph.rewrite.weight_views import View
from peftgraph.sites import Sites


def plan_fold(program: ProgramData, sites: Sites, trained: Mapping[str, Tensor]) -> FoldPlan:
    """Plan the fold of a program whose base is on the meta device; nothing is computed yet.

    Args:
        program: after its passes.
        sites: the sites of its base.
        trained: the values of the passes' parameters, by name.

    Raises:
        NoFold: something cannot be folded exactly.
        ProofError: the folded graph is not the base's, another tensor than the expected ones changes, or a value of a
            parameter is not finite.
    """
    check_finite(trained.items())
    folding = Folding(program, sites).run()
    if folding.reasons:
        raise NoFold(folding.reasons)
    folded = folding.result(program)
    verify(folded, program)
    proof = prove(program, folding, folded)
    values = {name: value.to(program.table[name].tensor.dtype) for name, value in trained.items()}
    return FoldPlan(program, values, tuple(_effects(program, folding.steps)), proof)


@dataclass(frozen=True)
class StepEffects:
    """A step, and the base's tensors that it reads and writes."""

    step: Step
    reads: frozenset[str]
    writes: frozenset[str]


@dataclass(frozen=True, eq=False)
class FoldPlan:
    """What folding does to each parameter.

    Attributes:
        program: what is folded, on the meta device.
        trained: the passes' parameters, in the dtypes that the program has for them.
        steps: in order, with their effects.
        proof: what could be proved on shapes.
    """

    program: ProgramData
    trained: Mapping[str, Tensor]
    steps: tuple[StepEffects, ...]
    proof: Proof

    @cached_property
    def changed(self) -> dict[str, tuple[str, ...]]:
        """The parameters that change, each with those whose stored values its new value is computed from."""
        names = dict.fromkeys(name for each in self.steps for name in sorted(each.writes))
        return {name: self._stored(self._steps_to(name)[1], name) for name in names}

    def dtype(self, name: str) -> torch.dtype:
        """Return the stored dtype of a parameter, to which its new value is rounded."""
        return stored_tensor(self.program, name).dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a parameter."""
        return tuple(stored_tensor(self.program, name).shape)

    def by_expert(self, name: str) -> bool:
        """Check whether every expert of a stack folds on its own."""
        steps, needed = self._steps_to(name)
        return _fold_by_chunk(steps, needed, self.program.table) and _weight(steps[0]).experts is not None

    def value(self, name: str, read: Callable[[str], Tensor], expert: int | None = None) -> Tensor:
        """Compute the new value of a parameter, rounded once to its stored dtype.

        Args:
            name: one of `changed`.
            read: returns the stored values of a parameter that `changed` lists for it, in memory that may be reused;
                called once for each.
            expert: the only one to compute, of a stack that is folded `by_expert`; the others may get any values.
        """
        steps, needed = self._steps_to(name)
        table = self.program.table
        stored = self._stored(needed, name)
        for one in stored:  # tied names stay tied, and are read once
            tensor = read(one)
            table = table.updated({tied: replace(table[tied], tensor=tensor) for tied in self.program.table.tied(one)})
        own = {full for step in steps if isinstance(step, WriteWindows) for full in step.parameters.values()}
        trained = {one for one in needed if self.program.table[one].base_tensor is not None}
        table = table.updated({one: self._trained(one) for one in own | trained})
        if _fold_by_chunk(steps, needed, table):
            return _in_place(name, steps, needed, table, expert)
        for step in steps:
            table, _ = step.run(table, None)
        return table[name].tensor.to(self.dtype(name))

    def _steps_to(self, name: str) -> tuple[list[Step], frozenset[str]]:
        """Return the steps that compute the new value of `name`, and the parameters that it is computed from."""
        needed, steps = frozenset({name}), []
        for each in reversed(self.steps):
            if each.writes & needed:
                needed |= each.reads | each.writes
                steps.append(each.step)
        return steps[::-1], needed

    def _stored(self, names: Iterable[str], wanted: str) -> tuple[str, ...]:
        """Return the names that start from stored values; of tied names one, which is `wanted` if it is among them."""
        table = self.program.table
        groups: dict[str, str] = {table.tied(wanted)[0]: wanted}
        start = sorted(name for name in names if table[name].base_tensor is None)
        for name in start:
            groups.setdefault(table.tied(name)[0], name)
        return tuple(name for name in start if groups[table.tied(name)[0]] == name)

    def _trained(self, name: str) -> TensorEntry:
        """Return the entry of a parameter with its trained value."""
        entry = self.program.table[name]
        value = self.trained[self.program.table.tied(name)[0]]
        kind = None if entry.base_tensor is None else torch.empty(0, dtype=entry.base_tensor.dtype)
        return replace(entry, tensor=value, base_tensor=kind)


def _fold_by_chunk(
    steps: Sequence[Step], needed: Collection[str], table: TensorTable
) -> TypeGuard[Sequence[WriteWindows]]:
    """Check whether steps fold one weight chunk by chunk, and no other tensor but its bias."""
    for step in steps:
        if not isinstance(step, WriteWindows) or not step.folds_by_chunk(table) or not set(needed) <= step.views.keys():
            return False
    return len({_weight(step).parameter for step in steps}) == 1


def _weight(step: Step) -> View:
    """Return the window of the weight that a step folds into."""
    assert isinstance(step, WriteWindows)
    first, *_ = step.views.values()
    return first


def _in_place(
    name: str, steps: Sequence[WriteWindows], needed: Collection[str], table: TensorTable, expert: int | None
) -> Tensor:
    """Compute the new value of a tensor of `table` in its memory, with one chunk at a time in the wide dtype."""
    params = [(step, step.parameter_values(table, None)) for step in steps]
    views = {one: view for one, view in steps[0].views.items() if one in needed}
    for chunk in steps[0].chunks(table):
        if expert not in (None, chunk.expert):
            continue
        folded = slice_table(table, views, chunk)
        for step, values in params:
            folded, _ = step.compute(folded, values, None, chunk)
        chunk.slice(table[name].tensor, views[name]).copy_(folded[name].tensor)
    return table[name].tensor


def _effects(program: ProgramData, steps: Iterable[Step]) -> Iterator[StepEffects]:
    """Yield the steps with the tensors they read and write, found by running them on shapes."""
    for step in steps:
        if isinstance(step, AcceptTrained):
            yield from (StepEffects(AcceptTrained((name,)), frozenset(), frozenset({name})) for name in step.names)
            continue
        table = RecordingTable(program.table)
        _, written = step.run(table, None)
        base = frozenset(name for name in table.read if not program.table[name].added)
        yield StepEffects(step, base, frozenset(view.parameter for view in written))
