"""A program is compared with the model that it was traced from, on the example and on other sizes, in both modes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._pytree import tree_map_only

from peftgraph.capture.diagnosis import exporter_silenced
from peftgraph.capture.eager_run import EagerResult, run_eagerly, run_on_fake_tensors, seeded, tracing_conditions
from peftgraph.capture.example_inputs import Example
from peftgraph.capture.fake_model import fake_tensor_like
from peftgraph.capture.first_difference import find_first_difference
from peftgraph.capture.probe_inputs import (
    free_sizes,
    other_masks,
    other_sizes,
    resize_example,
    sizes_allowed,
    smallest_free_sizes,
)
from peftgraph.capture.submodule import frozen_copy
from peftgraph.errors import TraceError
from peftgraph.ir.comparison_report import ComparisonReport
from peftgraph.ir.dtypes import short_dtype
from peftgraph.ir.interpreter import count_matrix_products, run_in_mode
from peftgraph.ir.program import ProgramData
from peftgraph.ir.tensor_table import TensorTable

Level = Literal["off", "example", "sizes"]
OTHERS = 4  # how many other sizes are tried until the model takes one
SAME = (torch.float32, torch.float32)  # a fake copy in its own dtypes
SHRINKS = 1e-4  # what is left in float64 of a difference that rounding in float32 made, at most
LARGE = 200_000_000  # numbers in the weights beyond which no copy in float64 is made


def compare_with_model(model: nn.Module, program: ProgramData, example: Example, level: Level) -> ProgramData:
    """Compare the program with the model as far as `level` asks; return it with the ranges of its sizes and the
    evidence.

    Raises:
        Differs: its outputs are not the model's.
        TraceError: the model does not take the example.
    """
    if level == "off":
        return program
    without_values = any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    comparison = ModelComparison(model, program, example, not without_values)
    if without_values:
        comparison.by_shapes(level)
    else:
        comparison.on_example()
    if level == "sizes" and not without_values:
        comparison.on_other_masks()
        comparison.on_other_sizes()
        ranges = comparison.smallest_sizes()
        program = program.evolve(signature=replace(program.signature, ranges=ranges))
    return program.evolve(
        comparison=ComparisonReport(tuple(comparison.runs), comparison.values, tuple(comparison.skipped))
    )


class ModelMismatch(TraceError):
    """The program is not the model: it gives another answer, or none.

    Attributes:
        stopped: whether it gives none.
    """

    stopped: bool = False


@dataclass(frozen=True)
class _Refused:
    """A call that the model itself does not take."""

    reason: str


@dataclass
class ModelComparison:
    """The comparison of one program with its model.

    Attributes:
        model: as it was given.
        program: what was traced from it.
        example: the call that was traced.
        values: whether the weights have values; else both run on fake tensors.
        runs: see `Checked`.
        skipped: see `Checked`.
        lows: the smallest sizes that a call may have, where the program stops below them.
    """

    model: nn.Module
    program: ProgramData
    example: Example
    values: bool
    runs: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    lows: dict[str, int] = field(default_factory=dict)

    def on_example(self) -> None:
        """Compare in both modes on the example.

        Raises:
            TraceError: the model does not accept the example, or its results differ from the program's.
        """
        refused = self.compare(self.example, training=False)
        if refused is not None:
            raise TraceError(
                f"{type(self.model).__name__} cannot be run on the example, to compare the program with it "
                f'({refused.reason}). Give an example that the model takes; verify="off" compares nothing.'
            )
        refused = self.compare(self.example, training=True)
        if refused is not None:
            self.skipped.append(f"training, where the model raises {refused.reason}")

    def on_other_masks(self) -> None:
        """Compare in evaluation with other masks: some that hide something where the example's hide nothing, and the
        reverse.

        Raises:
            TraceError: the model's results differ from the program's.
        """
        for call, what in other_masks(self.example):
            self.compare(call, training=False, what=what)

    def by_shapes(self, level: Level) -> None:
        """Compare shapes alone in both modes, at other sizes if `level` asks for them and there are some.

        Raises:
            TraceError: the program's outputs have other sizes than the model's.
        """
        found = other_sizes(self.program.signature, self.example) if level == "sizes" else iter(())
        sizes = next(found, None) if free_sizes(self.program.signature, self.example) else None
        call = self.example if sizes is None else resize_example(self.program.signature, self.example, sizes)
        for training in (False, True):
            refused = self.compare(call, training=training)
            if refused is not None:
                mode = "training" if training else "evaluation"
                self.skipped.append(f"{mode} at {_told(call)}: on shapes alone the model raises {refused.reason}")

    def on_other_sizes(self) -> None:
        """Compare in both modes with every free size changed, if the model accepts any other that the signature allows.

        Raises:
            TraceError: its results differ from the program's.
        """
        if not free_sizes(self.program.signature, self.example):
            return
        refused: _Refused | None = None
        for sizes in islice(other_sizes(self.program.signature, self.example), OTHERS):
            call = resize_example(self.program.signature, self.example, sizes)
            try:
                refused = self.compare(call, training=False)
            except ModelMismatch as error:
                if not (error.stopped and self._is_too_small(sizes)):
                    raise
                continue
            if refused is None:
                if self.compare(call, training=True) is not None:
                    self.skipped.append(f"training at {_told(call)}")
                return
        why = (
            "the signature allows none that differ in every free size"
            if refused is None
            else (f"at those that were tried the model raises {refused.reason}")
        )
        self.skipped.append(f"other sizes: {why}")

    def _is_too_small(self, sizes: dict[str, int]) -> bool:
        """Tell whether some sizes at which the program failed are below the example's, and exclude them from the
        ranges: a size computed from them, such as a number of patches, may be 1, which the exporter specialises."""
        now = free_sizes(self.program.signature, self.example)
        smaller = [dim for dim in sizes if sizes[dim] < now[dim] and not dim.startswith("B")]
        self.lows |= {dim: now[dim] for dim in smaller}
        return bool(smaller)

    def smallest_sizes(self) -> dict[str, tuple[int, int | None]]:
        """Return the ranges of the sizes: from 1 where the program equals the model at size 1, which the exporter
        treats as a special case, and from 2 otherwise."""
        signature = self.program.signature
        ranges, ones = dict(signature.ranges), smallest_free_sizes(signature, self.example)
        ranges |= {dim: (low, ranges.get(dim, (1, None))[1]) for dim, low in self.lows.items()}
        if self.lows:
            return ranges
        now = free_sizes(signature, self.example)
        if ones == now or not sizes_allowed(signature, ones) or self._is_same(ones):
            return ranges
        for dim in [dim for dim in ones if ones[dim] != now[dim]]:
            if not self._is_same({**now, dim: 1}):
                ranges[dim] = (2, ranges.get(dim, (1, None))[1])
        return ranges

    def _is_same(self, sizes: dict[str, int]) -> bool:
        call = resize_example(self.program.signature, self.example, sizes)
        try:
            return self.compare(call, training=False) is None
        except ModelMismatch:
            return False

    def compare(self, call: Example, *, training: bool, what: str = "") -> _Refused | None:
        """Run both on one call; return a refusal where the model itself does not accept it.

        Raises:
            Differs: their results differ.
        """
        mode = "training" if training else "evaluation"
        given = dict(zip((spec.name for spec in self.program.signature.inputs), call.tensors, strict=True))
        broken = [one for one in self.program.signature.assumptions if self.values and not one.holds(given)]
        if broken:
            return _Refused(f"what was assumed does not hold ({broken[0]})")
        try:
            expected = self._expected(call, training)
        except Exception as error:  # whatever the model's code raises on a call that it does not take
            first = (str(error).strip().splitlines() or [""])[0]
            return _Refused(f"{type(error).__name__}: {first}")
        try:
            found = self._found(call, training)
        except Exception as error:  # whatever an operator raises where the model raises nothing
            reason = f"it stops with {type(error).__name__}: {str(error).strip()}"
            differs = self._differs(call, training, what, reason)
            differs.stopped = True
            raise differs from error
        reason = _difference(self.program, found, expected, self.values)
        if reason is not None and not self._is_rounding(call, training, reason[1]):
            raise self._differs(call, training, what, reason[0], where=self.values)
        self.runs.append(f"{mode} at {_told(call)}{what}")
        return None

    def _expected(self, call: Example, training: bool) -> EagerResult:
        return (
            run_eagerly(self.model, call, training) if self.values else run_on_fake_tensors(self.model, call, training)
        )

    def _found(self, call: Example, training: bool) -> EagerResult:
        if self.values:
            return self._run(self.program, call, training)
        mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
        entries = {
            name: replace(entry, tensor=fake_tensor_like(entry.tensor, mode, *SAME))
            for name, entry in self.program.table.items()
        }
        inputs = [fake_tensor_like(tensor, mode, *SAME) for tensor in call.tensors]
        with exporter_silenced(), mode:
            return EagerResult(
                run_in_mode(self.program.evolve(table=TensorTable(entries)), inputs, training=training), {}
            )

    def _run(self, program: ProgramData, call: Example, training: bool) -> EagerResult:
        buffers: dict[str, Tensor] = {}

        def keep(node: Any, value: Any) -> None:
            if node.op == "get_attr":
                buffers[str(node.target)] = value

        with tracing_conditions(), seeded(self.model):
            leaves = run_in_mode(program, call.tensors, training=training, watcher=keep)
        return EagerResult(leaves, buffers)

    def _is_rounding(self, call: Example, training: bool, difference: float) -> bool:
        """Tell whether a difference shrinks at a higher precision, as one caused by rounding does."""
        program, model = self.program, self.model
        values = sum(parameter.numel() for parameter in model.parameters())
        if (
            not program.can_change_dtype
            or program.table.dtype == torch.float64
            or values > LARGE
            or not math.isfinite(difference)
        ):
            return False
        wide = call.with_arguments({k: tree_map_only(Tensor, _double, v) for k, v in call.arguments.items()})
        try:
            expected = run_eagerly(frozen_copy(model).double(), wide, training)
            found = self._run(_in_float64(program), wide, training)
        except Exception:  # what has no float64 form decides nothing
            return False
        left = _difference(_in_float64(program), found, expected, True)
        return left is None or left[1] <= difference * SHRINKS

    def _differs(self, call: Example, training: bool, what: str, reason: str, where: bool = False) -> ModelMismatch:
        mode = "training" if training else "evaluation"
        place = ""
        if where:
            place = find_first_difference(
                self.program, call.tensors, training, lambda: run_eagerly(self.model, call, training)
            )
        return ModelMismatch(
            f"{type(self.model).__name__} cannot be traced: the program that comes of it is not the model. In {mode} "
            f"at {_told(call)}{what} {reason}.\n{place}"
            "  what to do: the code decides something there that a graph cannot hold: by values, by what an earlier "
            "call left behind, or by sizes. Decide it by an argument, fix the sizes it depends on with "
            'pg.trace(model, example, fixed={"input": (1,)}), or trace a part of the model: root="...".'
        )


def _difference(
    program: ProgramData, found: EagerResult, expected: EagerResult, values: bool
) -> tuple[str, float] | None:
    """Return how two results differ, in words and relative to the largest value; None if by rounding at most."""
    keys = program.signature.output_keys
    if len(found.leaves) != len(expected.leaves):
        return f"it gives {len(found.leaves)} outputs instead of {len(expected.leaves)}", math.inf
    pairs = list(zip(keys, found.leaves, expected.leaves, strict=True))
    written = [name for name in found.buffers if name in expected.buffers]
    pairs += [(f"the buffer {name} afterwards", found.buffers[name], expected.buffers[name]) for name in written]
    depth = max(1, count_matrix_products(program.graph))
    for key, ours, theirs in pairs:
        if not isinstance(ours, Tensor) or not isinstance(theirs, Tensor):
            if values and (type(ours) is not type(theirs) or ours != theirs):
                return f"{key} is {ours!r} instead of {theirs!r}", math.inf
            continue
        if not _same_form(ours, theirs):
            return f"{key} is {_form(ours)} instead of {_form(theirs)}", math.inf
        distance = _distance(ours, theirs) if values else 0.0
        if distance > _bound(ours.dtype, program.table.dtype, depth):
            return f"{key} is another, by {distance:.1e} of its largest value", distance
    return None


def _same_form(ours: Tensor, theirs: Tensor) -> bool:
    """Tell whether dtypes and sizes are equal; sizes that count values are not known on fake tensors."""
    if ours.dtype != theirs.dtype or ours.dim() != theirs.dim():
        return False
    sizes = zip(ours.shape, theirs.shape, strict=True)
    return all(a == b for a, b in sizes if isinstance(a, int) and isinstance(b, int))


def _distance(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest difference over the largest magnitude; infinite where non-finite values differ."""
    if torch.equal(ours, theirs):
        return 0.0
    if not ours.is_floating_point():
        return 1.0
    ours, theirs = ours.double(), theirs.double()
    both = ours.isfinite() & theirs.isfinite()
    if not torch.equal(ours[~both].nan_to_num(), theirs[~both].nan_to_num()):
        return math.inf
    ours, theirs = ours[both], theirs[both]
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-300)) if ours.numel() else 0.0


def _bound(dtype: torch.dtype, own: torch.dtype, depth: int) -> float:
    """Return the largest difference that rounding explains. Both run the same operators, so bits are usually equal;
    kernels that depend on strides may sum in another order, which changes each product by a few roundings, and these
    add up like a random walk."""
    if not dtype.is_floating_point:
        return 0.0
    return 8 * max(torch.finfo(dtype).eps, torch.finfo(own).eps) * math.sqrt(depth)


def _in_float64(program: ProgramData) -> ProgramData:
    entries = {
        name: replace(entry, tensor=_double(entry.tensor))
        for name, entry in program.table.items()
        if entry.kind != "constant"
    }
    return program.evolve(table=program.table.updated(entries))


def _double(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value


def _form(value: Tensor) -> str:
    return f"{short_dtype(value.dtype)}[{', '.join(map(str, value.shape))}]"


def _told(call: Example) -> str:
    """Format the sizes of a call: `input_ids 3x7`."""
    sized = [leaf for leaf in call.leaves if isinstance(leaf.value, Tensor)]
    return ", ".join(f"{leaf.key} {'x'.join(map(str, leaf.value.shape)) or 'scalar'}" for leaf in sized)
