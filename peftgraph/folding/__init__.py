"""Folding edits into the weights, and the proof that nothing else changed."""

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
    """The folded program, with its proof.

    Raises:
        NoFold: something is left and `partial` is off.
        ProofError: the fold did not hold what it promises.
    """
    folding = Folding(program, sites, untie=untie).run()
    if folding.reasons and not partial:
        raise NoFold(folding.reasons)
    folded = folding.result(program)
    verify(folded, program)
    return folded.evolve(proof=prove(program, folding, folded))
