"""Let go of the weights that codes took the place of."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from peftgraph.errors import PeftGraphError
from peftgraph.ir.program import ProgramData

P = TypeVar("P", bound=ProgramData)


def release_quantised(program: P) -> P:
    """Return a program that knows its quantised weights by their codes alone, and so does its base.

    Raises:
        PeftGraphError: no weight is quantised.
    """
    names = program.table.quantised
    if not names:
        raise PeftGraphError("No weight of this program is stored as codes, so that there is nothing to release.")
    table = program.table.updated({name: replace(program.table[name], base_tensor=None) for name in names})
    base = program.base
    assert base is not None
    stand_ins = {name: replace(base.table[name], tensor=table[name].tensor) for name in names}
    bare = base.evolve(table=base.table.updated(stand_ins))
    object.__setattr__(bare, "base", bare)
    return program.evolve(table=table, base=bare)
