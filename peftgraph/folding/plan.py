"""A fold one parameter at a time: decided on shapes, computed when the parameter's values come.

The engine runs on the meta device, which decides what folds and in which order; its steps are kept. The new value of a
parameter is what those of the steps give that lead to it, on the stored values alone that they read.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeGuard

import torch
from torch import Tensor

from peftgraph.errors import NoFold
from peftgraph.folding.engine import Folding, stored_tensor
from peftgraph.folding.proof import Proof, check_finite, prove
from peftgraph.folding.steps import Recording, Settle, Step, Write, cut
from peftgraph.ir.program import ProgramData
from peftgraph.ir.tensor_table import TensorEntry, TensorTable
from peftgraph.ir.verifier import verify
from peftgraph.rewrite.weight_views import View
from peftgraph.sites import Sites


def plan(program: ProgramData, sites: Sites, trained: Mapping[str, Tensor]) -> Plan:
    """Decides the fold of a program whose base is on the meta device.

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
    return Plan(program, values, tuple(_taken(program, folding.steps)), proof)


@dataclass(frozen=True)
class Taken:
    """A step, and the base's tensors that it reads and writes."""

    step: Step
    reads: frozenset[str]
    writes: frozenset[str]


@dataclass(frozen=True, eq=False)
class Plan:
    """What folding does to each parameter.

    Attributes:
        program: what is folded, on the meta device.
        trained: the passes' parameters, in the dtype that the program has them in.
        taken: the steps, in order.
        proof: what could be proved on shapes.
    """

    program: ProgramData
    trained: Mapping[str, Tensor]
    taken: tuple[Taken, ...]
    proof: Proof

    @cached_property
    def changed(self) -> dict[str, tuple[str, ...]]:
        """The parameters that change, each with those whose stored values its own new value is computed from."""
        names = dict.fromkeys(name for each in self.taken for name in sorted(each.writes))
        return {name: self._stored(self._path(name)[1], name) for name in names}

    def dtype(self, name: str) -> torch.dtype:
        """The stored dtype of a parameter, which its new value is rounded to."""
        return stored_tensor(self.program, name).dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a parameter."""
        return tuple(stored_tensor(self.program, name).shape)

    def by_expert(self, name: str) -> bool:
        """Whether each expert of a stack folds on its own."""
        steps, needed = self._path(name)
        return _splits(steps, needed, self.program.table) and _weight(steps[0]).experts is not None

    def value(self, name: str, read: Callable[[str], Tensor], expert: int | None = None) -> Tensor:
        """The new value of a parameter, rounded once to its stored dtype.

        Args:
            name: one of `changed`.
            expert: compute this one alone, of a stack that is folded `by_expert`; all others may have any values.
            read: gives the stored values of the parameters that `changed` lists for it, in memory that is taken over;
                each is read once.
        """
        steps, needed = self._path(name)
        table = self.program.table
        stored = self._stored(needed, name)
        for one in stored:  # what was tied stays so, and is read once
            tensor = read(one)
            table = table.updated({tied: replace(table[tied], tensor=tensor) for tied in self.program.table.tied(one)})
        own = {full for step in steps if isinstance(step, Write) for full in step.parameters.values()}
        trained = {one for one in needed if self.program.table[one].base_tensor is not None}
        table = table.updated({one: self._trained(one) for one in own | trained})
        if _splits(steps, needed, table):
            return _in_place(name, steps, needed, table, expert)
        for step in steps:
            table, _ = step.run(table, None)
        return table[name].tensor.to(self.dtype(name))

    def _path(self, name: str) -> tuple[list[Step], frozenset[str]]:
        """The steps that lead to the new value of `name`, and the parameters that it is computed from."""
        needed, steps = frozenset({name}), []
        for each in reversed(self.taken):
            if each.writes & needed:
                needed |= each.reads | each.writes
                steps.append(each.step)
        return steps[::-1], needed

    def _stored(self, names: Iterable[str], wanted: str) -> tuple[str, ...]:
        """Those that start from what is stored and no trained copy; of tied ones one, `wanted` if it is of them."""
        table = self.program.table
        groups: dict[str, str] = {table.tied(wanted)[0]: wanted}
        start = sorted(name for name in names if table[name].base_tensor is None)
        for name in start:
            groups.setdefault(table.tied(name)[0], name)
        return tuple(name for name in start if groups[table.tied(name)[0]] == name)

    def _trained(self, name: str) -> TensorEntry:
        entry = self.program.table[name]
        value = self.trained[self.program.table.tied(name)[0]]
        kind = None if entry.base_tensor is None else torch.empty(0, dtype=entry.base_tensor.dtype)
        return replace(entry, tensor=value, base_tensor=kind)


def _splits(steps: Sequence[Step], needed: Collection[str], table: TensorTable) -> TypeGuard[Sequence[Write]]:
    """Whether steps fold one weight, part by part, and no other tensor but the bias beside it."""
    for step in steps:
        if not isinstance(step, Write) or not step.splits(table) or not set(needed) <= step.views.keys():
            return False
    return len({_weight(step).parameter for step in steps}) == 1


def _weight(step: Step) -> View:
    assert isinstance(step, Write)
    return next(iter(step.views.values()))


def _in_place(
    name: str, steps: Sequence[Write], needed: Collection[str], table: TensorTable, expert: int | None
) -> Tensor:
    """The new value of a tensor of `table`, computed in its memory: a part is wide at a time."""
    params = [(step, step.params(table, None)) for step in steps]
    views = {one: view for one, view in steps[0].views.items() if one in needed}
    for part in steps[0].parts(table):
        if expert not in (None, part.expert):
            continue
        folded = cut(table, views, part)
        for step, values in params:
            folded, _ = step.take(folded, values, None, part)
        part.of(table[name].tensor, views[name]).copy_(folded[name].tensor)
    return table[name].tensor


def _taken(program: ProgramData, steps: Iterable[Step]) -> Iterator[Taken]:
    """The steps with what they read and write, found by taking them on shapes."""
    for step in steps:
        if isinstance(step, Settle):
            yield from (Taken(Settle((name,)), frozenset(), frozenset({name})) for name in step.names)
            continue
        table = Recording(program.table)
        _, written = step.run(table, None)
        base = frozenset(name for name in table.read if not program.table[name].added)
        yield Taken(step, base, frozenset(view.parameter for view in written))
