"""Folds edits into the weights, and proves that nothing else changed."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, TypeVar, get_args

from peftgraph.errors import NoFold, PeftGraphError, QuantisedWeights
from peftgraph.folding.dequantised import dequantised, quantisation_errors, requantised
from peftgraph.folding.engine import Folding
from peftgraph.folding.proof import Facts, check_facts, prove
from peftgraph.ir.program import ProgramData
from peftgraph.ir.verifier import verify
from peftgraph.sites import Sites

P = TypeVar("P", bound=ProgramData)
OfCodes = Literal["refuse", "dequantise", "requantise"]


def fold(
    program: P, sites: Sites, *, partial: bool, untie: bool, quantised: OfCodes = "refuse", facts: Facts = "auto"
) -> P:
    """Return the folded program, with its proof.

    Args:
        program: what is folded.
        sites: of its base.
        partial: whether what cannot be folded is kept.
        untie: whether a tied weight that must change gets a tensor of its own.
        quantised: what becomes of weights that are stored as codes: they are refused, or dequantised, or dequantised
            and stored as codes again.
        facts: what is proved beside the text and the values.

    Raises:
        NoFold: an edit cannot be folded and `partial` is off.
        QuantisedWeights: that is because weights are stored as codes.
        ProofError: a fact of the proof does not hold.
    """
    if quantised not in get_args(OfCodes):
        known = ", ".join(map(repr, get_args(OfCodes)))
        raise PeftGraphError(f"quantised must be one of {known}, got {quantised!r}.")
    check_facts(facts)
    if quantised == "refuse" or not program.table.quantised:
        return _fold(program, sites, partial, untie, facts)
    names = tuple(program.table.quantised)
    plain, passes = dequantised(program, sites)
    folded = _fold(plain, sites, partial, untie, facts)
    proof = replace(folded.proof, dequantised=names)
    if quantised == "dequantise":
        return folded.evolve(proof=proof)
    if not passes:
        raise PeftGraphError(
            "No pass of this program made its codes, so that none says how they are made anew. Fold with "
            'quantised="dequantise", and apply quantise to a trace of the model that is written so.'
        )
    coded = requantised(folded, sites, passes)
    return coded.evolve(proof=replace(proof, requantised=quantisation_errors(coded, sites)))


def _fold(program: P, sites: Sites, partial: bool, untie: bool, facts: Facts) -> P:
    folding = Folding(program, sites, untie=untie).run()
    if folding.reasons and not partial:
        if program.table.quantised:
            raise QuantisedWeights(folding.reasons, len(program.table.quantised))
        raise NoFold(folding.reasons)
    folded = folding.result(program)
    verify(folded, program)
    return folded.evolve(proof=prove(program, folding, folded, facts))
