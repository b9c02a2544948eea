"""Whether a model does the same in training and in evaluation, dropout and batch norm apart.

A quick look decides whether one trace is enough: the operations of a call under train() and under eval(), on fake
tensors. It also finds what no trace can follow: numbers drawn by Python or NumPy, which a graph would freeze.
"""

from __future__ import annotations

import itertools
import random
import sys
import traceback
from collections.abc import Iterable, Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from peftgraph.capture.assumptions import AssumptionRecorder
from peftgraph.capture.diagnosis import CodeLine, describe_line, exporter_silenced, is_model_code, random_rates
from peftgraph.capture.example_inputs import Example
from peftgraph.capture.fake_model import compiling_flag_set, fake_arguments, fake_copy_of
from peftgraph.capture.repeated_rules import CallMemory
from peftgraph.errors import TraceError
from peftgraph.ir.dtype_literals import LITERAL_FORMS

FOLLOWED = {
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "alpha_dropout",
    "feature_alpha_dropout",
    "feature_dropout",
    "contiguous",  # no operation where the kernel of a mode gives this layout already
}
# Whether code casts depends on the dtypes at hand, and a graph that is traced under a marker holds every cast.
CASTS = {"to", "type", "type_as", "float", "double", "half", "bfloat16", "detach", "numel", "is_floating_point"}
# One of their literals follows the mode: dropout_p, training, use_input_stats.
SWITCHED = {"scaled_dot_product_attention", "batch_norm", "instance_norm", "rrelu"}
ALL_ONES = 0x12DD9BB3  # the word of a Mersenne twister whose output is 32 ones
LITERALS = (bool, int, float, str, torch.dtype)


Step = tuple[str, tuple[str, ...]]  # an operation; the values it reads, and its literals


@dataclass(frozen=True)
class ModeCheck:
    """What a model does on a call, in its own dtypes.

    Attributes:
        agree: whether a call under train() and one under eval() run the same operations; False also where that is open.
        steps: what runs in training and, where the two do not agree, in evaluation, casts apart.
    """

    agree: bool
    steps: tuple[list[Step], ...]


def compare_modes(model: nn.Module, example: Example) -> ModeCheck:
    """Compare the operations of a call in both modes, on fake tensors.

    Raises:
        TraceError: the model draws random numbers outside torch; the message names the line.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    fake_model = fake_copy_of(model, mode, torch.float32, torch.float32)
    found: list[_Recorder] = []
    whole, memory = True, CallMemory(mode)
    for training in (True, False):
        recorder = _Recorder(memory)
        complete = _runs(fake_model.train(training), example, mode, recorder)
        if recorder.drew:
            extremes = _at_extremes(fake_model, example, mode, memory)
            if extremes is None:
                raise _frozen(model, recorder.drawn)
            recorder, complete = extremes, True
        whole = whole and complete
        found.append(recorder)
    agree = whole and found[0].steps == found[1].steps
    return ModeCheck(agree, tuple(one.uncast.steps for one in (found[:1] if agree else found)))


def agrees_under_dtype(
    model: nn.Module, example: Example, own: torch.dtype, marker: torch.dtype, look: ModeCheck
) -> bool:
    """Tell whether the model's code runs the same operations under `marker` as under its `own` dtype; it does not where
    it branches on the dtype, or computes a number from a dtype's limits.

    Args:
        model: the model.
        example: a call of it.
        own: the dtype of its weights.
        marker: another.
        look: the check of its own dtype.
    """
    alike = _literals_of(own, marker)
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    fake_model, memory = fake_copy_of(model, mode, own, marker), CallMemory(mode)
    for ours, training in zip(look.steps, (True, False), strict=False):
        recorder = _Recorder(memory)
        _runs(fake_model.train(training), example, mode, recorder, (own, marker))
        # Where a run stops, on values that fake tensors do not have, both are compared that far.
        if not all(_same_step(a, b, alike) for a, b in zip(ours, recorder.uncast.steps, strict=False)):
            return False
    return True


def _same_step(ours: Step, theirs: Step, alike: set[tuple[str, str]]) -> bool:
    names = ours[0] == theirs[0] and len(ours[1]) == len(theirs[1])
    return names and all(a == b or (a, b) in alike for a, b in zip(ours[1], theirs[1], strict=True))


def _literals_of(own: torch.dtype, marker: torch.dtype) -> set[tuple[str, str]]:
    """Return the literals that follow the dtype, under each of the two."""
    forms = {name: form for name, form in LITERAL_FORMS.items() if name != "wide"}
    if torch.bfloat16 in (own, marker):  # which has no complex form
        del forms["complex"]
    return {(repr(form(own)), repr(form(marker))) for form in forms.values()}


def _at_extremes(fake_model: nn.Module, example: Example, mode: FakeTensorMode, memory: CallMemory) -> _Recorder | None:
    """Return the record of a call if its operations are the same whether Python and NumPy draw the smallest or the
    largest number everywhere (as with a rate of 0); None if they differ."""
    recorders: list[_Recorder] = []
    for largest in (False, True):
        recorder = _Recorder(memory, largest)
        with _bounded(largest):
            complete = _runs(fake_model, example, mode, recorder)
        if not complete:
            return None
        recorders.append(recorder)
    low, high = recorders
    return low if (low.steps, low.rates) == (high.steps, high.rates) else None


@contextmanager
def _bounded(largest: bool) -> Iterator[None]:
    """Make Python draw the first or the last of several choices."""
    generator: Any = random.random.__self__
    with patch.object(generator, "_randbelow", lambda n: n - 1 if largest else 0):
        yield


def _draw_extremes(largest: bool) -> None:
    """Make the generators of Python and NumPy draw the smallest or the largest number 623 times. The state is set,
    since code may have imported the functions under other names; the last number ends loops that reject such draws."""
    words = (ALL_ONES if largest else 0,) * 623 + (1,)
    random.setstate((3, (*words, 0), None))
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.set_state(("MT19937", numpy.array(words, dtype=numpy.uint32), 0, 0, 0.0))


def _runs(
    fake_model: nn.Module,
    example: Example,
    mode: FakeTensorMode,
    recorder: _Recorder,
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32),
) -> bool:
    """Tell whether a call runs to its end; restore the states of Python's and NumPy's generators afterwards. Tensors of
    the first of `dtypes` are passed in the second."""
    args, kwargs = example.call(fake_arguments(dict(example.arguments), mode, *dtypes))
    before = _state()
    try:
        recorder.begin()
        with (
            torch.no_grad(),
            mode,
            AssumptionRecorder(example.assume),
            recorder,
            exporter_silenced(),
            compiling_flag_set(),
        ):
            recorder.end(example.result(fake_model(*args, **kwargs)))
    except Exception as error:  # what cannot run on fake tensors is traced in both modes; the export explains it
        recorder.look([(frame.f_code, line) for frame, line in traceback.walk_tb(error.__traceback__)][::-1])
        return False
    finally:
        _restore(before)
    return True


class _Trail:
    """Operations with the values that they read, numbered in the order in which they are first read.

    Attributes:
        followed: operations that are taken for their first operand.
        steps: the others.
    """

    def __init__(self, followed: Set[str]) -> None:
        self.followed = followed
        self.steps: list[Step] = []
        self._numbers: dict[int, int] = {}
        self._fresh = itertools.count()
        self._alive: list[Tensor] = []  # so that no id is given twice

    def begin(self, name: str, operands: Any, *, counted: bool) -> None:
        """Record an operation before it runs."""
        if counted and name not in self.followed:
            self.record(name, operands)

    def end(self, name: str, first: Any, result: Any, *, counted: bool) -> None:
        """Record the result of an operation."""
        if name in self.followed:
            if isinstance(result, Tensor):
                self._numbers[id(result)] = self._number(first)
                self._alive.append(result)
        elif counted:
            for leaf in pytree.tree_leaves(result):
                if isinstance(leaf, Tensor):
                    self._number(leaf)

    def record(self, name: str, operands: Any) -> None:
        """Record a step: the values that it reads, and its literals."""
        leaves, tree = pytree.tree_flatten(operands)
        read = [f"%{self._number(leaf)}" for leaf in leaves if isinstance(leaf, Tensor)]
        literals = [] if name in SWITCHED else [repr(leaf) for leaf in leaves if isinstance(leaf, LITERALS)]
        self.steps.append((name, (*read, *literals, str(tree) if name == "return" else "")))

    def _number(self, value: Tensor) -> int:
        self._alive.append(value)
        if id(value) not in self._numbers:
            self._numbers[id(value)] = next(self._fresh)
        return self._numbers[id(value)]


class _Recorder(TorchFunctionMode):
    """Records the operations of a call, and the first place at which numbers were drawn outside of torch."""

    def __init__(self, memory: CallMemory, largest: bool | None = None) -> None:
        super().__init__()
        self.memory = memory
        self.largest = largest  # which extreme is drawn; None: what the generators give
        self.every, self.uncast = _Trail(FOLLOWED), _Trail(FOLLOWED | CASTS)
        self.rates: list[float] = []  # literals of operations that follow the mode
        self.drew = False
        self.drawn: list[CodeLine] = []  # where it was seen first; empty where it was behind the last operation
        self._before = _state()

    @property
    def steps(self) -> list[Step]:
        """The operations, casts among them."""
        return self.every.steps

    def begin(self) -> None:
        """Set the generators if extremes are to be drawn."""
        if self.largest is not None:
            _draw_extremes(self.largest)

    def end(self, result: Any) -> None:
        """Record the result of the call."""
        for trail in (self.every, self.uncast):
            trail.record("return", result)
        self.look(())

    def look(self, places: Iterable[CodeLine]) -> None:
        """Record `places`, innermost first, if random numbers were drawn since the last look."""
        if self.largest is not None:
            _draw_extremes(self.largest)
        elif not self.drew and not _equal(self._before, _state()):
            self.drew = True
            self.drawn = [place for place in places if is_model_code(place[0].co_filename)]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", str(func))
        frame = sys._getframe(1)
        self.look((one.f_code, line) for one, line in traceback.walk_stack(frame))
        counted = name != "__get__" and not frame.f_code.co_filename.endswith("batchnorm.py")
        trails = (self.every, self.uncast)
        for trail in trails:
            trail.begin(name, (args, kwargs or {}), counted=counted)
        result = self.memory.call(func, args, kwargs or {})
        if name in FOLLOWED | SWITCHED:
            self.rates += [one for one in pytree.tree_leaves((args, kwargs)) if isinstance(one, float)]
        for trail in trails:
            trail.end(name, args[0] if args else None, result, counted=counted)
        return result


def _state() -> list[Any]:
    """Return the state of Python's random numbers and, where it is loaded, of NumPy's."""
    numpy = sys.modules.get("numpy")
    return [random.getstate(), None if numpy is None else numpy.random.get_state()]


def _equal(a: list[Any], b: list[Any]) -> bool:
    if a[0] != b[0] or (a[1] is None) != (b[1] is None):
        return False
    return a[1] is None or (bool((a[1][1] == b[1][1]).all()) and a[1][2:] == b[1][2:])


def _restore(state: list[Any]) -> None:
    random.setstate(state[0])
    if state[1] is not None:
        sys.modules["numpy"].random.set_state(state[1])


def _frozen(model: nn.Module, places: list[CodeLine]) -> TraceError:
    where = "".join(describe_line(code.co_filename, line, code.co_name) for code, line in places[:1])
    return TraceError(
        f"{type(model).__name__} cannot be traced.\n{where}"
        "  why: the code draws random numbers with Python or NumPy here, or shortly before, and a graph would "
        "repeat what was drawn while tracing.\n"
        f"  what to do: {random_rates(model, places) or 'Switch that behaviour off'}, or draw them with torch."
    )
