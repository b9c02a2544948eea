"""What a module needs of its program to merge itself into a plain model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor, nn

from peftgraph.errors import PeftGraphError
from peftgraph.interop.write_back import write_back
from peftgraph.ir.program import ProgramData
from peftgraph.runtime.adapter_methods import Owner

P = TypeVar("P", bound=ProgramData)
Source = Callable[[], nn.Module | None]


def make_owner(program: P, fold: Callable[..., P], source: Source) -> Owner:
    """Return the operations of a program that its module offers.

    Args:
        program: the program.
        fold: folds such a program.
        source: returns the model that was traced, if it still exists. A module keeps it, unless weights are quantised,
            whose memory it would hold.
    """
    kept = source() if program.history and not program.table.quantised else None

    def with_values(values: Mapping[str, Tensor]) -> P:
        return _with_values(program, values)

    def merge(values: Mapping[str, Tensor], **options: Any) -> nn.Module:
        current = with_values(values)
        merged = fold(current, **options) if current.history else current
        model = source() if kept is None else kept
        if model is None:
            raise PeftGraphError(
                f"The {program.model} that was traced is not there any more, and a merged model would be a copy of it. "
                "Keep it, or write into another one: pg.fold(pg.program_of(net)).write_back(model)."
            )
        return write_back(merged, copy.deepcopy(model))

    return Owner(
        names=frozenset({*program.table.trainable, *program.table.state}),
        coded=sum(program.table[name].tensor.numel() for name in program.table.quantised),
        program=with_values,
        merge=merge,
    )


def _with_values(program: P, values: Mapping[str, Tensor]) -> P:
    """Return the program with other tensors; the program itself where they are its own."""
    table = program.table
    changes = {name: replace(table[name], tensor=one) for name, one in values.items() if one is not table[name].tensor}
    return program.evolve(table=table.updated(changes)) if changes else program
