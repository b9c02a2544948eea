"""Proves a fold, as evidence that can be read and printed.

The proof has three facts: the folded text is the base's text; exactly the expected tensors changed, each to the rounded
result of float64 algebra; and outputs on probe inputs agree, in float64 up to float64's rounding and in the program's
dtype up to its rounding. Values that are not finite prove nothing: parameters must be finite, and a written value or an
output may be infinite or NaN only where the base's own is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from peftgraph.errors import PeftGraphError
from peftgraph.folding.engine import Folding, stored_tensor
from peftgraph.ir.interpreter import count_matrix_products, run_in_evaluation, run_in_float64
from peftgraph.ir.printer import print_program
from peftgraph.ir.program import ProgramData
from peftgraph.rewrite.weight_views import View

Runner = Callable[[ProgramData, Sequence[Tensor]], list[Tensor]]
LIMIT = 8.0  # epsilons between a stored value and the exact one: float32 sums over a rank's terms, then one rounding


class ProofError(PeftGraphError):
    """The proof of a fold failed. Nothing was changed."""


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


@dataclass(frozen=True)
class Proof:
    """The evidence that a fold is exact.

    Attributes:
        text_equal: whether the folded program prints as the base does; None after a partial fold.
        changed: the base tensors that differ, with the windows the fold wrote.
        split: tied names that got their own tensor.
        state: the buffers that training wrote, which keep the adapted program's values.
        rounding: the largest distance of a stored value from the float64 algebra, in units of the dtype's epsilon.
        probes: the comparisons of outputs; empty on the meta device.
        left: the reasons for the edits that a partial fold did not fold.
        dequantised: the weights that were stored as codes, and into whose dequantised values was folded.
        requantised: after folding, weights were stored as codes again, which is not exact: the norm of the difference
            over the norm of the weight, by site.
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
        lines += [f"outputs   {probe}" for probe in self.probes]
        lines += [f"left      {reason}" for reason in self.left]
        if self.requantised:
            worst = max(self.requantised, key=lambda site: self.requantised[site])
            lines.append(
                f"NOT EXACT stored as codes again at {len(self.requantised)} sites; the largest relative error is "
                f"{self.requantised[worst]:.1e}, at {worst}"
            )
        return "\n".join(lines)


def prove(program: ProgramData, folding: Folding, folded: ProgramData) -> Proof:
    """Check a fold.

    Args:
        program: before folding.
        folding: the run that folded it.
        folded: its result.

    Raises:
        ProofError: a fact does not hold.
    """
    check_finite((name, program.table[name].tensor) for edit in program.edits for name in edit.parameters)
    text_equal = _compare_texts(program, folded, bool(folding.reasons))
    _compare_tensors(program, folding, folded)
    split = tuple(name for name in folding.changed if len(program.table.tied(name)) > len(folded.table.tied(name)))
    rounding: float | None = None
    probes: tuple[Probe, ...] = ()
    if program.table.device.type != "meta":
        exact = Folding(program, folding.sites, torch.float64, folding.untie).run().result(program)
        rounding = max((_rounding(folded, exact, program, name) for name in folding.changed), default=0.0)
        probes = tuple(_probe(program, folded, exact, folding.changed))
    changed = {name: tuple(dict.fromkeys(_window(view) for view in views)) for name, views in folding.changed.items()}
    state = tuple(program.table.state)
    return Proof(text_equal, changed, split, rounding, probes, tuple(folding.reasons), state)


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
        same = _bits(entry.tensor) == _bits(before)
        for view in folding.changed[name]:
            same = view.put(same, torch.ones_like(view.get(same)))
        if not bool(same.all()):
            raise ProofError(f"{name} changed outside of {', '.join(map(_window, folding.changed[name]))}.")


def _bits(tensor: Tensor) -> Tensor:
    """View values as integers with the same bits, so that NaN equals itself and 0.0 differs from -0.0."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(kinds[tensor.element_size()]) if tensor.is_floating_point() else tensor


def _rounding(folded: ProgramData, exact: ProgramData, program: ProgramData, name: str) -> float:
    """Return the largest distance of stored values from the exact ones, relative to the tensor's size, in epsilons.

    Raises:
        ProofError: it is too large, or values are not finite that are finite in the base.
    """
    stored, precise = folded.table[name].tensor, exact.table[name].tensor
    before = stored_tensor(program, name).double()
    finite = torch.isfinite(stored) & torch.isfinite(precise)
    if bool((~finite & torch.isfinite(before)).any()):
        raise ProofError(
            f"{name} is finite in the base and would not be after folding: its new values do not fit "
            f"{_short(stored.dtype)}. Convert the model to a wider dtype and fold there."
        )
    if not bool(finite.any()):
        return 0.0
    eps = torch.finfo(stored.dtype).eps
    stored, precise, before = stored.double()[finite], precise[finite], before[finite]
    before = torch.where(torch.isfinite(before), before, precise)  # what was no number may have become one
    magnitude = torch.stack([t.abs().max() for t in (precise, before, precise - before)]).max().clamp_min(1e-300)
    worst = float((stored - precise).abs().max() / magnitude / eps)
    if not worst <= LIMIT:
        raise ProofError(
            f"{name} is {worst:.1f} epsilon away from the float64 algebra after folding; {LIMIT:.0f} are allowed."
        )
    return worst


def _probe(program: ProgramData, folded: ProgramData, exact: ProgramData, changed: Iterable[str]) -> list[Probe]:
    """Compare outputs before and after the fold, in float64 and in the program's dtype.

    Raises:
        ProofError: they differ by more than their bound.
    """
    depth, dtype = max(1, count_matrix_products(program.graph)), program.table.dtype
    base = program.base if program.base is not None else program
    stored = {dtype, *(folded.table[name].tensor.dtype for name in changed)}  # what changed is rounded to its own
    bounds = torch.float64, max(stored, key=lambda kind: torch.finfo(kind).eps)
    runs: list[tuple[Runner, ProgramData, torch.dtype]] = [
        (run_in_float64, exact, torch.float64),
        (run_in_evaluation, folded, dtype),
    ]
    found: list[Probe] = []
    for inputs in probe_inputs(program):
        what = ", ".join("x".join(map(str, value.shape)) for value in inputs)
        for (runner, after, kind), coarse in zip(runs[: 1 + (dtype != torch.float64)], bounds, strict=False):
            before, now = runner(program, inputs), runner(after, inputs)
            known = _known(before, now, partial(runner, base, inputs), what)
            unknown = sum(int((~finite).sum()) for finite in known)
            error = _distance(before, now, known)
            found.append(_checked(Probe(what, _short(kind), error, _bound(coarse, depth), unknown)))
    return found


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


def _bound(dtype: torch.dtype, depth: int) -> float:
    """Return the allowed error: those of `depth` products add up like a random walk; 64 covers norms that amplify."""
    return 64 * torch.finfo(dtype).eps * math.sqrt(depth)


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
    batches = {spec.dims[0] for spec in program.signature.inputs if spec.dims}
    examples = [program.example]
    if all(isinstance(dim, str) for dim in batches):
        examples.append(tuple(value[:1] if value.dim() else value for value in program.example))
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


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _window(view: View) -> str:
    return str(view)
