"""Compares the outputs of a program before and after a fold, on its example.

Errors of a model's products add up like a random walk, which bounds the difference in float64 and float32. In half
precision that would allow anything. There, the folded program must be about as close to float64's outputs as the
adapted one is, in the middle row of all: a router that chooses other experts for some tokens is no fault of a fold.
Where even this exceeds what the passes change, the comparison could not fail, and is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peftgraph.folding.proof_error import ProofError
from peftgraph.ir.interpreter import Run, count_matrix_products, evaluation_run, float64_run
from peftgraph.ir.program import ProgramData

COARSE = 0.01  # a relative difference that is too large to allow
WORSE = 4.0  # times the distance of the adapted outputs from float64's: two roundings that have nothing in common
SLACK = 8.0  # epsilons: a few outputs may be exact by chance


@dataclass(frozen=True)
class Probe:
    """One comparison of outputs.

    Attributes:
        what: the inputs, by shape.
        dtype: that both programs ran in.
        error: the largest difference over the largest magnitude of the output.
        bound: on the error, by the dtype.
        unknown: the number of outputs that are not finite, as the base's are not, and were not compared.
    """

    what: str
    dtype: str
    error: float
    bound: float
    unknown: int = 0

    def __str__(self) -> str:
        rest = f"; {self.unknown} outputs are not finite, nor are the base's" if self.unknown else ""
        return f"{self.what}, {self.dtype}: relative difference {self.error:.1e}, bound {self.bound:.1e}{rest}"


def probe(
    program: ProgramData, folded: ProgramData, exact: ProgramData, changed: Iterable[str]
) -> tuple[list[Probe], str]:
    """Compare outputs before and after a fold, in float64 and in the program's dtype.

    Args:
        program: before the fold.
        folded: its result.
        exact: the result with the new values in float64, not rounded.
        changed: the tensors that differ.

    Returns:
        The comparisons; and why one in the program's dtype was left out, "" if none was.

    Raises:
        ProofError: outputs differ by more than their bound.
    """
    runs = _Runs(program, folded, exact, changed)
    found: list[Probe] = []
    blind = ""
    for inputs in probe_inputs(program):
        what = ", ".join("x".join(map(str, value.shape)) for value in inputs)
        precise = runs.in_float64(inputs, what)
        found.append(precise)
        if program.table.dtype != torch.float64:
            one = runs.in_dtype(inputs, what)
            found += [one] if isinstance(one, Probe) else []
            blind = one if isinstance(one, str) else blind
    return found, blind


class _Runs:
    """The programs that are compared, each prepared once."""

    def __init__(self, program: ProgramData, folded: ProgramData, exact: ProgramData, changed: Iterable[str]) -> None:
        self._base = program.base if program.base is not None else program
        self._dtype, self._depth = program.table.dtype, math.sqrt(max(1, count_matrix_products(program.graph)))
        stored = {self._dtype, *(folded.table[name].tensor.dtype for name in changed)}  # each is rounded to its own
        self._coarse = max(torch.finfo(kind).eps for kind in stored)
        self._names = list(program.examples)
        self._wide = self._of(program, float64_run), self._of(exact, float64_run)
        narrow = self._dtype != torch.float64
        self._own = (self._of(program, evaluation_run), self._of(folded, evaluation_run)) if narrow else None
        self._precise: Sequence[Tensor] = ()
        self._usual = 0.0  # the distance of the adapted outputs from float64's

    def _of(self, program: ProgramData, prepare: Callable[[ProgramData], Run]) -> Run:
        """Return what runs a program for the inputs of the adapted one, some of which it may not have."""
        run, names = prepare(program), set(program.examples)
        return lambda inputs: run([x for name, x in zip(self._names, inputs, strict=True) if name in names])

    def in_float64(self, inputs: Sequence[Tensor], what: str) -> Probe:
        """Compare the adapted program with the exact one."""
        before, now = (run(inputs) for run in self._wide)
        self._precise = before
        known = _known(before, now, lambda: self._of(self._base, float64_run)(inputs), what)
        bound = 64 * torch.finfo(torch.float64).eps * self._depth  # 64 covers norms that amplify
        return _checked(Probe(what, "float64", _distance(before, now, known), bound, _unknown(known)))

    def in_dtype(self, inputs: Sequence[Tensor], what: str) -> Probe | str:
        """Compare the adapted program with the folded one in their own dtype; or return why that could not fail."""
        assert self._own is not None
        name = str(self._dtype).removeprefix("torch.")
        before, now = (run(inputs) for run in self._own)
        known = _known(before, now, lambda: self._of(self._base, evaluation_run)(inputs), what)
        bound = 64 * self._coarse * self._depth
        if bound <= COARSE:
            return _checked(Probe(what, name, _distance(before, now, known), bound, _unknown(known)))
        self._usual = max(self._usual, _middle_distance(self._precise, before, known))
        bound = WORSE * self._usual + SLACK * self._coarse
        probe = _checked(Probe(what, name, _middle_distance(self._precise, now, known), bound, _unknown(known)))
        change = _middle_distance(self._precise, self._of(self._base, evaluation_run)(inputs), known)
        if change > bound:
            return probe
        return f"rounding in {name} may move them by {bound:.1e}, and the passes change them by {change:.1e}"


def _unknown(known: Sequence[Tensor]) -> int:
    return sum(int((~finite).sum()) for finite in known)


def _known(
    before: Sequence[Tensor], now: Sequence[Tensor], base: Callable[[], Sequence[Tensor]], what: str
) -> list[Tensor]:
    """Return, for each output, a mask of the values that are finite and so can be compared.

    Args:
        before: the outputs of the program.
        now: the outputs of the folded program.
        base: computes the outputs of the base.
        what: the inputs, for messages.

    Raises:
        ProofError: an output is not finite where the base's is, or none is finite anywhere.
    """
    known = [torch.isfinite(x) & torch.isfinite(y) for x, y in zip(before, now, strict=True)]
    if all(bool(finite.all()) for finite in known):
        return known
    for number, (finite, own) in enumerate(zip(known, base(), strict=True)):
        excused = ~torch.isfinite(own) if own.shape == finite.shape else torch.zeros_like(finite)
        if bool((~finite & ~excused).any()):
            raise ProofError(
                f"Output {number} on {what} is infinite or no number where the base's is finite, so that nothing is "
                "proved there: what the passes learned is too large for this model."
            )
    if not any(bool(finite.any()) for finite in known):
        raise ProofError(f"No output on {what} is finite, nor is the base's, so that outputs prove nothing.")
    return known


def _middle_distance(a: Sequence[Tensor], b: Sequence[Tensor], known: Sequence[Tensor]) -> float:
    """Return the relative difference of two lists of outputs in their middle rows, of the output where it is largest;
    whole numbers are not compared."""
    worst = 0.0
    for x, y, finite in zip(a, b, known, strict=True):
        if not x.is_floating_point() or x.shape != y.shape or not x.numel():
            continue
        finite = finite & torch.isfinite(x) & torch.isfinite(y)
        x, y = (torch.where(finite, one.double(), 0.0) for one in (x, y))
        x, y = (one.reshape(-1, one.shape[-1]) if one.dim() else one.reshape(1, 1) for one in (x, y))
        rows = (x - y).norm(dim=-1) / x.norm(dim=-1).clamp_min(1e-300)
        worst = max(worst, float(rows.median()))
    return worst


def _checked(probe: Probe) -> Probe:
    """Return the probe if its error is within its bound.

    Raises:
        ProofError: it is not.
    """
    if not probe.error <= probe.bound:
        raise ProofError(
            f"Outputs on {probe.what} in {probe.dtype} differ by {probe.error:.1e}; {probe.bound:.1e} is allowed."
        )
    return probe


def probe_inputs(program: ProgramData) -> list[tuple[Tensor, ...]]:
    """Return the traced example, and its first row alone where the batch size is free."""
    specs = program.signature.inputs
    batches = {spec.dims[0] for spec in specs if spec.dims and not spec.added}
    examples = [program.example]
    if all(isinstance(dim, str) for dim in batches):
        rows = [not spec.added or any(dim in batches for dim in spec.dims[:1]) for spec in specs]
        pairs = zip(program.example, rows, strict=True)
        examples.append(tuple(value[:1] if value.dim() and row else value for value, row in pairs))
    return examples


def _distance(a: Sequence[Tensor], b: Sequence[Tensor], known: Sequence[Tensor]) -> float:
    """Return the largest difference of two lists of outputs where they are finite, over the largest magnitude."""
    worst = 0.0
    for x, y, finite in zip(a, b, known, strict=True):
        if not x.is_floating_point():
            worst = max(worst, 0.0 if torch.equal(x, y) else math.inf)
            continue
        x, y = x.double(), y.double()
        if not torch.equal(torch.isfinite(x), torch.isfinite(y)):
            return math.inf
        x, y = x[finite], y[finite]
        if x.numel():
            worst = max(worst, float((x - y).abs().max() / x.abs().max().clamp_min(1e-300)))
    return worst
