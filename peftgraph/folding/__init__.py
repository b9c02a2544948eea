"""Folds edits into the weights, and proves that nothing else changed."""

from __future__ import annotations

from typing import TypeVar

from peftgraph.errors import NoFold
from peftgraph.folding.engine import Folding
from peftgraph.folding.proof import prove
from peftgraph.ir.program import ProgramData
from peftgraph.ir.verifier import verify
from peftgraph.sites import Sites

P = TypeVar("P", bound=ProgramData)


def fold(program: P, sites: Sites, *, partial: bool, untie: bool) -> P:
    """Return the folded program, with its proof.

    Raises:
        NoFold: an edit cannot be folded and `partial` is off.
        ProofError: a fact of the proof does not hold.
    """
    folding = Folding(program, sites, untie=untie).run()
    if folding.reasons and not partial:
        raise NoFold(folding.reasons)
    folded = folding.result(program)
    verify(folded, program)
    return folded.evolve(proof=prove(program, folding, folded))
