"""Named passes of one program, put together with weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

from peftgraph.errors import PeftGraphError, RecipeError
from peftgraph.ir.program import ProgramData
from peftgraph.rewrite.options import plain
from peftgraph.rewrite.remove import reapply
from peftgraph.sites import Sites

P = TypeVar("P", bound=ProgramData)


def mix(program: P, sites: Sites, weights: Mapping[str, float]) -> P:
    """Return the program in which each pass named in `weights` is scaled by its weight; parameters are shared.

    Raises:
        PeftGraphError: a name belongs to no pass.
        RecipeError: a weight is no finite number, or is not 1 and the pass cannot be weighted.
    """
    named = list(dict.fromkeys(applied.name for applied in program.history if applied.name))
    for name in weights:
        if name not in named:
            raise PeftGraphError(f"No pass is called {name!r}. Named passes: {', '.join(named) or 'none'}.")
    kept = [applied for applied in program.history if not applied.name or applied.name in weights]
    numbers = {name: _weight(name, weight) for name, weight in weights.items()}
    methods = [applied.method.weighted(numbers[applied.name]) if applied.name else applied.method for applied in kept]
    if [applied.method for applied in program.history] == methods:
        return program
    weighted = [replace(applied, method=method) for applied, method in zip(kept, methods, strict=True)]
    return reapply(program, sites, 0, weighted)


def _weight(name: str, weight: float) -> float:
    try:
        return plain(weight, float)
    except ValueError as error:
        raise RecipeError(f"The weight of {name!r} cannot be {weight!r}: {error}.") from None
