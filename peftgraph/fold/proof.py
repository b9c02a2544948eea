"""The proof of a fold, as evidence that can be read and printed.

Three facts make it: the folded text is the base's text; exactly the expected tensors changed, each by one rounding of
what float64 algebra gives; and outputs on probe inputs agree, in float64 up to float64's own rounding and in the
program's dtype up to its rounding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peftgraph.errors import PeftGraphError
from peftgraph.fold.engine import Folding, stored_tensor
from peftgraph.ir.program import ProgramData
from peftgraph.ir.run import contractions, run, run_wide
from peftgraph.ir.text import print_program
from peftgraph.rewrite.views import View


class ProofError(PeftGraphError):
    """A fold did not hold what it promises. Nothing was changed."""


@dataclass(frozen=True)
class Probe:
    """One comparison of outputs.

    Attributes:
        what: the inputs, by shape.
        dtype: what both programs ran in.
        error: the largest difference over the largest magnitude of the output.
        bound: what the dtype allows.
    """

    what: str
    dtype: str
    error: float
    bound: float


@dataclass(frozen=True)
class Proof:
    """The evidence that a fold is exact.

    Attributes:
        text_equal: the folded program prints as the base does; None after a partial fold.
        changed: the base tensors that differ, with the windows the fold wrote.
        split: tied tensors that got one of their own.
        rounding: the largest distance of a stored value from the float64 algebra, in units of the dtype's epsilon.
        probes: the comparisons of outputs; empty on the meta device.
        left: for a partial fold, the reasons for what was left.
    """

    text_equal: bool | None
    changed: Mapping[str, tuple[str, ...]]
    split: tuple[str, ...]
    rounding: float | None
    probes: tuple[Probe, ...]
    left: tuple[str, ...] = ()

    def __str__(self) -> str:
        text = {True: "equal to the base's text", False: "DIFFERS", None: "not compared (partial fold)"}[
            self.text_equal
        ]
        lines = [
            f"text      {text}",
            f"changed   {len(self.changed)} tensors, as expected; every other tensor is the base's own",
        ]
        if self.split:
            lines.append(f"untied    {', '.join(self.split)}")
        if self.rounding is not None:
            lines.append(
                f"rounding  {self.rounding:.2f} epsilon at most between a stored value and the float64 algebra"
            )
        lines += [
            f"outputs   {p.what}, {p.dtype}: relative difference {p.error:.1e}, bound {p.bound:.1e}"
            for p in self.probes
        ]
        lines += [f"left      {reason}" for reason in self.left]
        return "\n".join(lines)


def prove(program: ProgramData, folding: Folding, folded: ProgramData) -> Proof:
    """Checks a fold.

    Args:
        program: before folding.
        folding: the run that folded it.
        folded: its result.

    Raises:
        ProofError: a fact does not hold.
    """
    text_equal = _compare_texts(program, folded, bool(folding.reasons))
    _compare_tensors(program, folding, folded)
    split = tuple(name for name in folding.changed if len(program.table.tied(name)) > len(folded.table.tied(name)))
    rounding: float | None = None
    probes: tuple[Probe, ...] = ()
    if program.table.device.type != "meta":
        exact = Folding(program, folding.sites, torch.float64, folding.untie).run().result(program)
        rounding = _rounding(folded, exact, program, list(folding.changed))
        probes = tuple(_probe(program, folded, exact))
    changed = {name: tuple(dict.fromkeys(_window(view) for view in views)) for name, views in folding.changed.items()}
    return Proof(text_equal, changed, split, rounding, probes, tuple(folding.reasons))


def _compare_texts(program: ProgramData, folded: ProgramData, partial: bool) -> bool | None:
    if partial:
        return None
    base = program.base if program.base is not None else program
    if print_program(folded) != print_program(base):
        raise ProofError("The folded graph is not the base's graph.")
    return True


def _compare_tensors(program: ProgramData, folding: Folding, folded: ProgramData) -> None:
    """Everything outside of the changed windows is bit for bit what the base holds."""
    for name, entry in folded.table.items():
        if entry.added:
            continue
        before = stored_tensor(program, name)
        if name not in folding.changed:
            if entry.tensor is not before and not (entry.trainable and program.table[name].tensor is entry.tensor):
                raise ProofError(f"{name} was not to change, but is another tensor now.")
            continue
        if before.device.type == "meta":
            continue
        same = entry.tensor == before
        for view in folding.changed[name]:
            same = view.put(same, torch.ones_like(view.get(same)))
        if not bool(same.all()):
            raise ProofError(f"{name} changed outside of {', '.join(map(_window, folding.changed[name]))}.")


def _rounding(folded: ProgramData, exact: ProgramData, program: ProgramData, names: Sequence[str]) -> float:
    """The largest distance of a stored value from the exact one, in epsilons of its dtype and its tensor's size."""
    worst = 0.0
    for name in names:
        stored, precise = folded.table[name].tensor, exact.table[name].tensor
        before = stored_tensor(program, name).double()
        magnitude = torch.stack([t.abs().max() for t in (precise, before, precise - before)]).max().clamp_min(1e-300)
        eps = torch.finfo(stored.dtype).eps
        worst = max(worst, float((stored.double() - precise).abs().max() / magnitude / eps))
    limit = 8.0  # float32 accumulation over a rank's terms, then one rounding
    if worst > limit:
        raise ProofError(
            f"A folded weight is {worst:.1f} epsilon away from the float64 algebra; {limit:.0f} are allowed."
        )
    return worst


def _probe(program: ProgramData, folded: ProgramData, exact: ProgramData) -> list[Probe]:
    depth = max(1, contractions(program.graph))
    found: list[Probe] = []
    for inputs in probe_inputs(program):
        what = ", ".join("x".join(map(str, value.shape)) for value in inputs)
        algebra = _distance(run_wide(program, inputs), run_wide(exact, inputs))
        found.append(_checked(Probe(what, "float64", algebra, _bound(torch.float64, depth))))
        dtype = program.table.dtype
        if dtype != torch.float64:
            stored = _distance(run(program, inputs), run(folded, inputs))
            found.append(_checked(Probe(what, str(dtype).removeprefix("torch."), stored, _bound(dtype, depth))))
    return found


def _bound(dtype: torch.dtype, depth: int) -> float:
    """Rounding errors of `depth` products add up like a random walk; 64 covers their growth through norms."""
    return 64 * torch.finfo(dtype).eps * math.sqrt(depth)


def _checked(probe: Probe) -> Probe:
    if not probe.error <= probe.bound:
        raise ProofError(
            f"Outputs on {probe.what} in {probe.dtype} differ by {probe.error:.1e}; {probe.bound:.1e} is allowed."
        )
    return probe


def probe_inputs(program: ProgramData) -> list[tuple[Tensor, ...]]:
    """The traced example, and its first row alone where the batch is free."""
    batches = {spec.dims[0] for spec in program.signature.inputs if spec.dims}
    examples = [program.example]
    if all(isinstance(dim, str) for dim in batches):
        examples.append(tuple(value[:1] if value.dim() else value for value in program.example))
    return examples


def _distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """The largest difference of two lists of outputs, over the largest magnitude; nan counts as infinite."""
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        if not x.is_floating_point():
            worst = max(worst, 0.0 if torch.equal(x, y) else math.inf)
            continue
        x, y = x.double(), y.double()
        both = torch.isfinite(x) & torch.isfinite(y)
        if not torch.equal(torch.isfinite(x), torch.isfinite(y)):
            return math.inf
        x, y = x[both], y[both]
        if x.numel():
            worst = max(worst, float((x - y).abs().max() / x.abs().max().clamp_min(1e-300)))
    return worst


def _window(view: View) -> str:
    return str(view)
