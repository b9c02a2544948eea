"""Custom autograd functions, kept whole.

Export traces the forward of a `torch.autograd.Function` and loses its backward: outputs would agree and gradients
would be silently wrong. While a model is exported, each call of such a function is recorded as one operator; in the
canonical graph the function itself stands in the operator's place, so that it runs, forward and backward, as its
author wrote it.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointFunction

from peftgraph.errors import TraceError

LITERAL_TYPES = (
    bool,
    int,
    float,
    str,
    torch.dtype,
    torch.device,
    type(None),
)  # what a graph holds beside tensors and sizes
ADVICE = "Write it in plain operations, or as a torch.library.custom_op with register_autograd."


@dataclass(frozen=True)
class AutogradFunctionTarget:
    """The target of a graph's node: a call of `function`, an autograd function. Equal where the function is."""

    function: type[torch.autograd.Function]

    def __call__(self, *args: Any) -> Any:
        """Run the function with its own backward."""
        return self.function.apply(*args)

    @property
    def __name__(self) -> str:
        return self.function.__name__


@dataclass(frozen=True)
class _Slot:
    """The place of a tensor, or of a symbolic size, in the arguments of a call."""

    kind: str
    index: int


@dataclass
class RecordedCall:
    """A recorded call.

    Attributes:
        function: the function that is called.
        arguments: its arguments, with slots for tensors and for symbolic sizes.
        results: its result once it has run on fake tensors: a slot for each tensor, None for what is no tensor.
        operators: what its forward is made of, by name.
    """

    function: type[torch.autograd.Function]
    arguments: tuple[Any, ...]
    results: Any = None
    operators: frozenset[str] = frozenset()


@dataclass
class CallRecording:
    """The calls of one export, by number, and whether one of them is running."""

    calls: list[RecordedCall] = field(default_factory=list)
    running: bool = False


_recordings: list[CallRecording] = []
_library = torch.library.Library("peftgraph", "DEF")
_library.define("autograd_function(int number, Tensor[] tensors, SymInt[] sizes) -> Tensor[]")


@torch.library.register_fake("peftgraph::autograd_function", lib=_library)
def _run_on_fakes(number: int, tensors: list[Tensor], sizes: list[torch.SymInt]) -> list[Tensor]:
    recording = _recordings[-1]
    call = recording.calls[number]
    given: dict[str, Sequence[Any]] = {"tensor": tensors, "size": sizes}
    arguments = _filled(call.arguments, lambda slot: given[slot.kind][slot.index])
    versions = [tensor._version for tensor in tensors]
    recording.running = True
    try:
        with torch.no_grad(), _Operators() as operators:
            result = call.function.apply(*arguments)
    finally:
        recording.running = False
    if versions != [tensor._version for tensor in tensors]:
        raise TraceError(f"The autograd function {_name(call.function)} writes into its input. {ADVICE}")
    outputs: list[Tensor] = []
    call.results = _slots_of(call.function, result, outputs)
    call.operators = frozenset(operators.seen)
    # An operator may not give its operands back, as an identity with a backward of its own does.
    return [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device) for t in outputs]


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(func._schema.name.split("::")[-1])
        return func(*args, **(kwargs or {}))


@contextmanager
def record_autograd_calls() -> Iterator[CallRecording]:
    """Record the calls of custom autograd functions, and look through reentrant gradient checkpointing.

    `apply` reads `forward` of the function's class, so the call is intercepted there. `apply` itself is C code that a
    model may have bound long before (`f = MyFunction.apply`).
    """

    def attribute(cls: Any, name: str) -> Any:
        value = type.__getattribute__(cls, name)
        if name != "forward" or recording.running or type.__getattribute__(cls, "__module__").startswith("torch."):
            return value
        return _recorded_forward(recording, cls, value)

    recording = CallRecording()
    _recordings.append(recording)
    metaclass = type(torch.autograd.Function)
    try:
        with (
            patch.object(metaclass, "__getattribute__", attribute),
            patch.object(CheckpointFunction, "apply", lambda function, _, *operands: function(*operands)),
        ):
            yield recording
    finally:
        _recordings.pop()
        if _recordings:
            raise AssertionError("exports do not nest")


def add_autograd_call(
    graph: fx.Graph, call: RecordedCall, tensors: Sequence[Any], sizes: Sequence[Any]
) -> tuple[fx.Node, list[Any]]:
    """Add `call` to a graph; return its node and one node for each tensor it returns (a getitem where there are
    several)."""
    given = {"tensor": tensors, "size": sizes}
    arguments = _filled(call.arguments, lambda slot: given[slot.kind][slot.index])
    node = graph.call_function(AutogradFunctionTarget(call.function), arguments)
    node.meta["operators"] = call.operators
    if isinstance(call.results, _Slot):
        return node, [node]
    places = [i for i, part in enumerate(call.results) if isinstance(part, _Slot)]
    return node, [graph.call_function(operator.getitem, (node, i)) for i in places]


def _recorded_forward(recording: CallRecording, cls: type, forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return a replacement for `forward` that records the call while an export runs."""
    own_context = type.__getattribute__(cls, "setup_context") is not torch.autograd.Function.setup_context

    @functools.wraps(forward)
    def call(*args: Any) -> Any:
        if torch.is_grad_enabled():  # `apply` switches gradients off first: this is a call of `forward` by itself
            return forward(*args)
        return _record(recording, cls, args if own_context else args[1:], lambda: forward(*args))

    return call


def _record(recording: CallRecording, cls: Any, args: tuple[Any, ...], plain: Callable[[], Any]) -> Any:
    tensors: list[Tensor] = []
    sizes: list[torch.SymInt] = []

    def slot(value: Any) -> Any:
        if isinstance(value, Tensor):
            tensors.append(value)
            return _Slot("tensor", len(tensors) - 1)
        if isinstance(value, torch.SymInt):
            sizes.append(value)
            return _Slot("size", len(sizes) - 1)
        if isinstance(value, LITERAL_TYPES):
            return value
        raise TraceError(
            f"The model gives its autograd function {_name(cls)} a {type(value).__name__}, which a graph cannot "
            f"hold beside tensors, numbers and strings. {ADVICE}"
        )

    arguments = _filled(args, slot)
    if not tensors:
        return plain()
    call = RecordedCall(cls, arguments)
    recording.calls.append(call)
    outputs = torch.ops.peftgraph.autograd_function(len(recording.calls) - 1, tensors, sizes)
    return _filled(call.results, lambda part: outputs[part.index] if isinstance(part, _Slot) else part)


def _filled(tree: Any, fill: Callable[[Any], Any]) -> Any:
    """Replace every leaf of `tree` but the plain ones, keeping tuples, lists and dicts of exactly these types."""
    if type(tree) in (tuple, list):
        return type(tree)(_filled(value, fill) for value in tree)
    if type(tree) is dict:
        return {key: _filled(value, fill) for key, value in tree.items()}
    return tree if isinstance(tree, LITERAL_TYPES) else fill(tree)


def _slots_of(function: type, result: Any, outputs: list[Tensor]) -> Any:
    """Return the result of a call with slots for its tensors, which are put into `outputs`."""
    if isinstance(result, Tensor):
        outputs.append(result)
        return _Slot("tensor", len(outputs) - 1)
    if type(result) is tuple and any(isinstance(part, Tensor) for part in result):
        return tuple(_slots_of(function, part, outputs) for part in result)
    if isinstance(result, LITERAL_TYPES):
        return result
    raise TraceError(f"The autograd function {_name(function)} returns a {type(result).__name__}. {ADVICE}")


def _name(function: type) -> str:
    return f"{function.__module__}.{function.__qualname__}"
