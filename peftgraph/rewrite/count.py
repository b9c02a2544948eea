"""Three ways to count a program's parameters: what trains, what changes in the base, and the rank of each change."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from peftgraph.ir.edits import Edit
from peftgraph.ir.interpreter import fake_table
from peftgraph.ir.program import ProgramData
from peftgraph.ir.tensor_table import TensorEntry, TensorTable
from peftgraph.rewrite.match import match_all
from peftgraph.rewrite.rule import Params, Rule
from peftgraph.rewrite.weight_views import View
from peftgraph.sites import Sites


@dataclass(frozen=True)
class Change:
    """What folding an edit changes: a window of a stored parameter, how many values, and the rank of the difference.

    `rank` is None for a vector; `full` for a matrix means that no smaller bound is known.
    """

    site: str
    view: View
    values: int
    rank: int | None
    full: bool


@dataclass(frozen=True)
class Bytes:
    """The bytes of a program's tensors; of tied ones once.

    Attributes:
        base: of the base, as the model stores it.
        weights: of what is stored of it as it was; what trains and copies of state are among `adapters`.
        codes: of quantised weights.
        constants: of their blocks or rows, with the tables of codes.
        adapters: of what passes added, and of the program's own copies of tensors of the base.
        optimiser: of the two moments that Adam keeps of what trains.
        full_optimiser: of those that it would keep if all parameters of the base trained.
    """

    base: int
    weights: int
    codes: int
    constants: int
    adapters: int
    optimiser: int
    full_optimiser: int

    @property
    def stored(self) -> int:
        """What the program stores in place of the base."""
        return self.weights + self.codes + self.constants + self.adapters

    def __str__(self) -> str:
        return (
            f"stored {self.stored:,} bytes of {self.base:,} (weights {self.weights:,}, codes {self.codes:,}, constants "
            f"{self.constants:,}, adapters {self.adapters:,}); Adam {self.optimiser:,} of {self.full_optimiser:,}"
        )


@dataclass(frozen=True)
class Count:
    """The sizes of a program.

    Attributes:
        trainable: values that train.
        added: values of parameters that passes added.
        changed: values of the base that differ once everything foldable is folded.
        total: values of the base's own parameters; tied ones once.
        changes: one entry for each changed window.
        state: values of buffers that training writes and that belong to the adapted program.
        bytes: of what is stored; counting needs no weights.
        quantised: how many weights are stored as codes.
    """

    trainable: int
    added: int
    changed: int
    total: int
    changes: tuple[Change, ...]
    bytes: Bytes
    state: int = 0
    quantised: int = 0

    @property
    def percent(self) -> float:
        """Trainable values as a percentage of the base."""
        return 100 * self.trainable / self.total if self.total else 0.0

    def __str__(self) -> str:
        ranks = sorted({change.rank for change in self.changes if change.rank is not None and not change.full})
        full = sum(change.full for change in self.changes)
        vectors = sum(change.rank is None for change in self.changes)
        parts = [
            f"rank {rank} in {sum(c.rank == rank and not c.full for c in self.changes)} matrices" for rank in ranks
        ]
        parts += [f"full rank in {full} matrices"] if full else []
        parts += [f"{vectors} vectors"] if vectors else []
        return (
            f"trainable {self.trainable:,} ({self.percent:.4f} %), added {self.added:,}, changed {self.changed:,}, "
            f"total {self.total:,}; changes: {', '.join(parts) or 'none'}"
            + (f"; state {self.state:,}" if self.state else "")
            + (f"; {self.quantised} weights as codes: {self.bytes}" if self.quantised else "")
        )


def count(program: ProgramData, sites: Sites) -> Count:
    """Count a program's parameters."""
    changes = changes_of(program, sites)
    return Count(
        trainable=sum(p.numel() for p in _unique(program.table, lambda e: e.trainable)),
        added=sum(p.numel() for p in _unique(program.table, lambda e: e.added and e.kind == "parameter")),
        changed=_changed(program.table, changes),
        total=sum(p.numel() for p in _unique(program.table, lambda e: not e.added and e.kind == "parameter")),
        changes=changes,
        bytes=count_bytes(program.table),
        state=sum(buffer.numel() for buffer in _unique(program.table, lambda e: e.is_state and not e.keeps_dtype)),
        quantised=len(_unique(program.table, lambda e: e.quantised is not None)),
    )


def _changed(table: TensorTable, changes: Iterable[Change]) -> int:
    """Return how many values some changes concern; several in one window, or one of all, concern no more than there
    are."""
    windows: dict[tuple[str, str], int] = {}
    for one in changes:
        name = table.tied(one.view.parameter)[0]
        key = (name, str(one.view.window))
        size = math.prod(one.view.shape(table[name].tensor))
        windows[key] = min(windows.get(key, 0) + one.values, size)
    stored: dict[str, int] = {}
    for (name, _), values in windows.items():
        stored[name] = min(stored.get(name, 0) + values, table[name].tensor.numel())
    return sum(stored.values())


def count_bytes(table: TensorTable) -> Bytes:
    """Count the bytes of a table's tensors; also on the meta device."""
    of_codes = {how.tensors[0] for how in table.quantised.values()}
    beside = {name for how in table.quantised.values() for name in how.tensors[1:]}
    parts: dict[str, dict[int, torch.Tensor]] = {
        one: {} for one in ("base", "weights", "codes", "constants", "adapters")
    }
    for name, entry in table.items():
        if not entry.added:
            before = entry.tensor if entry.base_tensor is None else entry.base_tensor
            parts["base"][id(before)] = before
        if entry.quantised is None:
            own = entry.added or entry.base_tensor is not None
            part = "codes" if name in of_codes else "constants" if name in beside else "adapters" if own else "weights"
            parts[part][id(entry.tensor)] = entry.tensor
    trained = _unique(table, lambda entry: entry.trainable)
    parameters = _unique(table, lambda entry: entry.kind == "parameter" and not entry.added)
    sizes = {part: _bytes(tensors.values()) for part, tensors in parts.items()}
    return Bytes(**sizes, optimiser=2 * _bytes(trained), full_optimiser=2 * _bytes(parameters))


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def rule_of(program: ProgramData, edit: Edit) -> Rule:
    """Return the rule that made an edit."""
    return program.history[edit.application].method.rules()[edit.rule]


def short_params(edit: Edit) -> dict[str, str]:
    """Return the parameters of an edit: short name -> full name."""
    return {name.rpartition(".")[2]: name for name in edit.parameters}


def changes_of(program: ProgramData, sites: Sites) -> tuple[Change, ...]:
    """Return the changes that folding would make, found by running each possible fold on shapes alone."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake = program.evolve(table=fake_table(program.table, mode))
    edited = {edit.site for edit in program.edits}
    matches = {match.site.id: match for match in match_all(fake, sites, (s for s in sites if s.id in edited))}
    found: list[Change] = []
    seen: set[tuple[object, ...]] = set()  # what several uses of one weight change together
    for edit in program.edits:
        rule = rule_of(program, edit)
        if isinstance(rule.fold, str):
            continue
        trained = {} if edit.moves else {id(program.table[name].tensor): name for name in reversed(edit.parameters)}
        for name in reversed(trained.values()):
            tensor = program.table[name].tensor
            found.append(
                Change(
                    edit.site,
                    View(name, vector=tensor.dim() == 1),
                    tensor.numel(),
                    _full_rank(tensor),
                    tensor.dim() > 1,
                )
            )
        if not edit.moves:
            continue
        match = matches[edit.site]
        params = Params({short: fake.table[full].tensor for short, full in short_params(edit).items()})
        with mode:
            results = rule.fold(match, params)
        for bound, value in results.items():
            window = program.table.tied(bound.view.parameter)[0], bound.view.window
            together = (*window, edit.application, () if rule.table_rows is not None else (edit.rule, edit.parameters))
            if together in seen:
                continue
            seen.add(together)
            largest = None if bound.view.vector else min(value.shape[-2:])
            bound_of_rank = _rank_bound(program, edit, rule)
            rank = largest if largest is None or bound_of_rank is None else min(largest, bound_of_rank)
            full = rank is not None and bound_of_rank is None
            values = value.numel() if rule.changed_values is None else rule.changed_values(_params(program, edit))
            found.append(Change(edit.site, bound.view, values, rank, full))
    return tuple(found)


def _rank_bound(program: ProgramData, edit: Edit, rule: Rule) -> int | None:
    """Return the largest rank of what an edit adds to a weight; None where nothing bounds it."""
    if not callable(rule.max_rank):
        return rule.max_rank
    every = [one for one in program.edits if (one.application, one.rule) == (edit.application, edit.rule)]
    return rule.max_rank(_params(program, edit), [_params(program, one) for one in every])


def _params(program: ProgramData, edit: Edit) -> Params:
    return Params({short: program.table[full].tensor for short, full in short_params(edit).items()})


def _full_rank(tensor: torch.Tensor) -> int | None:
    return None if tensor.dim() < 2 else min(tensor.shape[-2:])


def _unique(table: TensorTable, keep: Callable[[TensorEntry], bool]) -> list[torch.Tensor]:
    return list({id(entry.tensor): entry.tensor for entry in table.values() if keep(entry)}.values())
