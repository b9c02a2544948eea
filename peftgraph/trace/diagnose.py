"""From an exporter's exception to one message in the model's terms: which line, why, and what to change."""

from __future__ import annotations

import contextlib
import io
import linecache
import logging
import re
import sysconfig
import traceback
import warnings
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
        "The code branches on the values of a tensor, or sizes something by them, and a graph has only one "
        "path. Compute both sides and choose with torch.where, decide from shapes or from a Python argument "
        "instead, or trace the part of the model that has no such branch.",
    ),
    (
        r"\.item\(\)|aten\._local_scalar_dense|\.tolist\(\)",
        "The code turns a tensor into a Python number. Keep it a tensor, or pass the number as an argument.",
    ),
    (
        r"aten\.nonzero|dynamic output shape|DynamicOutputShape",
        "The size of a result depends on the values of a tensor. Use a mask of fixed shape instead.",
    ),
    (
        r"\.numpy\(\)|__array__|to ndarray",
        "The code leaves torch for NumPy, which no graph records. Write that line with torch operations.",
    ),
    (
        r"in output, which is not a known type",
        "Return tensors, tuples, lists, dicts or a transformers ModelOutput; or register the class with "
        "torch.export.register_dataclass.",
    ),
)
OTHERWISE = "Make that line work on tensors of symbolic size, or trace a part of the model without it."
NOT_THE_MODEL = (str(Path(torch.__file__).parent), str(Path(__file__).parent.parent), "<")
STANDARD_LIBRARY = sysconfig.get_path("stdlib")


def explain(model: nn.Module, error: BaseException) -> TraceError:
    """The error to raise for `error`, which the export of `model` ended in."""
    reason = _reason(error)
    advice = next((advice for pattern, advice in ADVICE if re.search(pattern, f"{reason}\n{error}")), OTHERWISE)
    place = _place(model, error)
    where = "" if place is None else describe_place(place.filename, place.lineno or 0, place.name)
    return TraceError(f"{type(model).__name__} cannot be traced.\n{where}  why: {reason}\n  what to do: {advice}")


def describe_place(file: str, line: int, function: str = "") -> str:
    """A line of code with its place, as a line and an excerpt of a message."""
    inside = f", in {function}" if function else ""
    return f"  at {file}:{line}{inside}\n      {linecache.getline(file, line).strip()}\n"


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    first = next((line for line in lines if line), "")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _place(model: nn.Module, error: BaseException) -> traceback.FrameSummary | None:
    """The innermost failing line of the model's package; else of code that is neither torch's nor ours."""
    packages = {type(module).__module__.partition(".")[0] for module in model.modules()} - {"torch"}
    fallback: traceback.FrameSummary | None = None
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        for frame, line in reversed(list(traceback.walk_tb(current.__traceback__))):
            file = frame.f_code.co_filename
            if _is_outside(file) or not linecache.getline(file, line):
                continue
            summary = traceback.FrameSummary(file, line, frame.f_code.co_name)
            if frame.f_globals.get("__name__", "").partition(".")[0] in packages:
                return summary
            fallback = fallback or summary
        current = current.__cause__ or current.__context__
    return fallback


def _is_outside(file: str) -> bool:
    library = file.startswith(STANDARD_LIBRARY) and "site-packages" not in file
    return library or file.startswith(NOT_THE_MODEL)


@contextmanager
def quiet() -> Iterator[None]:
    """Silences the exporter: its warnings, its log, and the graphs it prints when it fails."""
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
