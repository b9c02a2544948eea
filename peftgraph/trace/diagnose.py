"""From an exporter's exception to one message in the model's own terms: which line, why, and what to change."""

from __future__ import annotations

import linecache
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from peftgraph.errors import TraceError

# What went wrong (a pattern in the exporter's words) and what to do about it.
ADVICE = (
    (
        r"data-dependent|GuardOnDataDependent|Could not extract specialized integer|Could not guard",
        "The code branches on the values of a tensor, and a graph has only one path. Compute both sides and choose with "
        "torch.where, decide from shapes or from a Python argument instead, or trace the part of the model that has no such branch.",
    ),
    (
        r"\.item\(\)|aten\._local_scalar_dense|\.tolist\(\)",
        "The code turns a tensor into a Python number. Keep it a tensor, or pass the number as an argument.",
    ),
    (
        r"aten\.nonzero|dynamic output shape|DynamicOutputShape",
        "The size of a result depends on the values of a tensor. Use a mask of fixed shape instead.",
    ),
)  # fmt: skip


def explain(model: nn.Module, error: BaseException) -> TraceError:
    """The error to raise for `error`, which the export of `model` ended in."""
    text = f"{type(error).__name__}: {error}"
    advice = next((advice for pattern, advice in ADVICE if re.search(pattern, text)), None)
    reason = _reason(error)
    place = _place(error)
    lines = [f"{type(model).__name__} cannot be traced."]
    if place is not None:
        lines.append(f"  at {place.filename}:{place.lineno}, in {place.name}\n      {place.line}")
    lines.append(f"  why: {reason}")
    lines.append(f"  what to do: {advice or 'Make that line work on tensors of symbolic size, or trace a part of the model without it.'}")
    return TraceError("\n".join(lines))


def _reason(error: BaseException) -> str:
    for line in str(error).splitlines():
        line = line.strip()
        if line:
            return f"{type(error).__name__}: {line}"
    return type(error).__name__


def _place(error: BaseException) -> traceback.FrameSummary | None:
    """The innermost line of the failing code that is neither torch's nor ours."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    inside = (str(Path(torch.__file__).parent), str(Path(__file__).parent.parent), "<")
    for exception in reversed(chain):
        frames = traceback.extract_tb(exception.__traceback__)
        for frame in reversed(frames):
            if not frame.filename.startswith(inside) and linecache.getline(frame.filename, frame.lineno or 0):
                return frame
    return None


@contextmanager
def no_custom_functions() -> Iterator[None]:
    """Refuses a custom `torch.autograd.Function` inside the model.

    Export traces its forward only: outputs would agree and gradients would be silently wrong.
    """
    original = torch.autograd.Function.__dict__["apply"]

    def apply(cls: type, *args: object, **kwargs: object) -> object:
        if not cls.__module__.startswith("torch."):
            raise TraceError(
                f"The model calls the custom autograd function {cls.__module__}.{cls.__qualname__}. Its backward would be "
                "lost: outputs would agree and gradients would be silently wrong. Register it with torch.library.custom_op "
                "and register_autograd, or write its forward in differentiable operations."
            )
        return original.__get__(None, cls)(*args, **kwargs)

    torch.autograd.Function.apply = classmethod(apply)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        torch.autograd.Function.apply = original
