"""Proves a fold, as evidence that can be read and printed.

The folded text is the base's text; exactly the expected tensors changed, each to the rounded result of float64 algebra;
and the fold computes the same where it changes something: region by region in float64 (`regions.py`), by the outputs of
the whole model (`probes.py`), or both. Values that are not finite prove nothing: parameters must be finite, and a
written value or an output may be infinite or NaN only where the base's own is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from peftgraph.errors import PeftGraphError
from peftgraph.folding.components import stored_tensor
from peftgraph.folding.engine import Folding
from peftgraph.folding.exact_values import ExactValues
from peftgraph.folding.probes import Probe, probe
from peftgraph.folding.proof_error import ProofError
from peftgraph.folding.regions import RegionProof, prove_regions
from peftgraph.ir.printer import print_program
from peftgraph.ir.program import ProgramData
from peftgraph.rewrite.weight_views import View

Facts = Literal["auto", "regions", "outputs", "both"]
SMALL = 50_000_000  # values of a model times entries of its example: what outputs are compared for if nothing is said


@dataclass(frozen=True)
class Proof:
    """The evidence that a fold is exact.

    Attributes:
        text_equal: whether the folded program prints as the base does; None after a partial fold.
        changed: the base tensors that differ, with the windows the fold wrote.
        split: tied names that got their own tensor.
        state: the buffers that training wrote, which keep the adapted program's values.
        rounding: the largest distance of a stored value from the float64 algebra, in units of the dtype's epsilon.
        probes: the comparisons of outputs; empty where they were not asked for, and on the meta device.
        left: the reasons for the edits that a partial fold did not fold.
        dequantised: the weights that were stored as codes, and into whose dequantised values was folded.
        requantised: after folding, weights were stored as codes again, which is not exact: the norm of the difference
            over the norm of the weight, by site.
        regions: what was proved region by region; None where that was not asked for, or was not possible.
        no_regions: why it was not possible; the outputs were compared instead.
        no_probes: why outputs in the program's dtype were not compared.
    """

    text_equal: bool | None
    changed: Mapping[str, tuple[str, ...]]
    split: tuple[str, ...]
    rounding: float | None
    probes: tuple[Probe, ...]
    left: tuple[str, ...] = ()
    state: tuple[str, ...] = ()
    dequantised: tuple[str, ...] = ()
    requantised: Mapping[str, float] = field(default_factory=dict)
    regions: RegionProof | None = None
    no_regions: str = ""
    no_probes: str = ""

    def __str__(self) -> str:
        text = {True: "equal to the base's text", False: "DIFFERS", None: "not compared (partial fold)"}[
            self.text_equal
        ]
        lines = [
            f"text      {text}",
            f"changed   {len(self.changed)} tensors, as expected; every other tensor is the base's own",
        ]
        if self.state:
            lines.append(f"state     {len(self.state)} buffers that training writes have the adapted program's values")
        if self.dequantised:
            lines.append(
                f"codes     {len(self.dequantised)} weights were dequantised, and their values are the base here"
            )
        if self.split:
            lines.append(f"untied    {', '.join(self.split)}")
        if self.rounding is not None:
            lines.append(
                f"rounding  {self.rounding:.2f} epsilon at most between a stored value and the float64 algebra"
            )
        if self.regions is not None:
            lines.append(f"regions   {self.regions}")
        if self.no_regions:
            lines.append(f"regions   not compared: {self.no_regions}")
        lines += [f"outputs   {probe}" for probe in self.probes]
        if self.no_probes:
            lines.append(f"outputs   not compared in the dtype of the weights: {self.no_probes}")
        lines += [f"left      {reason}" for reason in self.left]
        if self.requantised:
            worst = max(self.requantised, key=lambda site: self.requantised[site])
            lines.append(
                f"NOT EXACT stored as codes again at {len(self.requantised)} sites; the largest relative error is "
                f"{self.requantised[worst]:.1e}, at {worst}"
            )
        return "\n".join(lines)


def prove(program: ProgramData, folding: Folding, folded: ProgramData, facts: Facts = "auto") -> Proof:
    """Check a fold.

    Args:
        program: before folding.
        folding: the run that folded it.
        folded: its result.
        facts: what is proved beside the text and the values: "regions", "outputs" or "both"; "auto" is the regions, and
            for a small model both.

    Raises:
        ProofError: a fact does not hold.
    """
    check_finite((name, program.table[name].tensor) for edit in program.edits for name in edit.parameters)
    text_equal = _compare_texts(program, folded, bool(folding.reasons))
    _compare_tensors(program, folding, folded)
    split = tuple(name for name in folding.changed if len(program.table.tied(name)) > len(folded.table.tied(name)))
    changed = {name: tuple(dict.fromkeys(_window(view) for view in views)) for name, views in folding.changed.items()}
    state = tuple(program.table.state)
    proof = Proof(text_equal, changed, split, None, (), tuple(folding.reasons), state)
    return proof if program.table.device.type == "meta" else _with_values(proof, program, folding, folded, facts)


def check_facts(facts: str) -> None:
    """Check the name of what is to be proved.

    Raises:
        PeftGraphError: it is none.
    """
    if facts not in get_args(Facts):
        known = ", ".join(map(repr, get_args(Facts)))
        raise PeftGraphError(f"prove must be one of {known}, got {facts!r}.")


def _with_values(proof: Proof, program: ProgramData, folding: Folding, folded: ProgramData, facts: Facts) -> Proof:
    """Return a proof with the facts about values."""
    exact = [ExactValues(one, program, folded, folding.changed) for one in folding.components]
    written = {name: one for one in exact for name in one.component.written_names if name in folding.changed}
    regions: RegionProof | None = None
    why = ""
    if facts != "outputs":
        found = prove_regions(program, folding, folded, written)
        regions, why = (None, found) if isinstance(found, str) else (found, "")
    rounding = max((one.epsilons() for one in exact), default=0.0)
    proof = replace(proof, rounding=rounding, regions=regions, no_regions=why)
    if facts in ("outputs", "both") or why or (facts == "auto" and _is_small(program)):
        probes, blind = probe(program, folded, folding.exact(folded), folding.changed)
        proof = replace(proof, probes=tuple(probes), no_probes=blind)
    return proof


def _is_small(program: ProgramData) -> bool:
    """Check whether the outputs of the whole model are compared although nobody asks for it."""
    values = sum(entry.tensor.numel() for entry in program.table.values())
    return values * max((value.numel() for value in program.example), default=1) <= SMALL


def check_finite(parameters: Iterable[tuple[str, Tensor]]) -> None:
    """Check that parameters contain no infinities and no NaN.

    Args:
        parameters: of the passes, with their names.

    Raises:
        ProofError: one does; the message names the first.
    """
    for name, tensor in parameters:
        known = tensor.device.type != "meta" and tensor.is_floating_point()
        wrong = int((~torch.isfinite(tensor.detach())).sum()) if known else 0
        if wrong:
            raise ProofError(
                f"{name} holds {wrong} values that are infinite or NaN, and these cannot be folded. Go back to "
                "an adapter from before its training failed."
            )


def _compare_texts(program: ProgramData, folded: ProgramData, partial: bool) -> bool | None:
    """Check that the folded program prints as the base does; None after a partial fold.

    Raises:
        ProofError: it does not.
    """
    if partial:
        return None
    base = program.base if program.base is not None else program
    if print_program(folded) != print_program(base):
        raise ProofError("The folded graph is not the base's graph.")
    return True


def _compare_tensors(program: ProgramData, folding: Folding, folded: ProgramData) -> None:
    """Check that all values outside the changed windows are bit for bit the base's.

    Raises:
        ProofError: one is not.
    """
    for name, entry in folded.table.items():
        if entry.added:
            continue
        before = stored_tensor(program, name)
        if name not in folding.changed:
            own = program.table[name].base_tensor is not None and program.table[name].tensor is entry.tensor
            if entry.tensor is not before and not own:  # what trains, or is the adapted program's own state
                raise ProofError(f"{name} was not to change, but is another tensor now.")
            continue
        if before.device.type == "meta":
            continue
        if any(_is_whole(view, before) for view in folding.changed[name]):
            continue
        same = _bits(entry.tensor) == _bits(before)
        for view in folding.changed[name]:
            same = view.put(same, torch.ones_like(view.get(same)))
        if not bool(same.all()):
            raise ProofError(f"{name} changed outside of {', '.join(map(_window, folding.changed[name]))}.")


def _is_whole(view: View, full: Tensor) -> bool:
    """Check whether a window is all of a tensor."""
    return view.window is None and math.prod(view.shape(full)) == full.numel()


def _bits(tensor: Tensor) -> Tensor:
    """View values as integers with the same bits, so that NaN equals itself and 0.0 differs from -0.0."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(kinds[tensor.element_size()]) if tensor.is_floating_point() else tensor


def _window(view: View) -> str:
    return str(view)
