"""From an exporter's exception to one message in the model's terms: which line, why, and what to change."""

from __future__ import annotations

import contextlib
import inspect
import io
import linecache
import logging
import re
import sys
import sysconfig
import threading
import traceback
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import CodeType

import sympy
import torch
from torch import fx, nn

from peftgraph.errors import TraceError

# What went wrong (a pattern in the exporter's words) and what to do about it.
ADVICE = (
    (
        r"data-dependent|GuardOnDataDependent|Could not extract specialized integer|Could not guard",
        "The code branches on the values of a tensor, or sizes something by them, and a graph has only one "
        "path. Compute both sides and choose with torch.where, decide from shapes or from a Python argument "
        'instead, or trace a part of the model that has no such branch: pg.trace(model, example, root="...").',
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
        r"cannot be solved using",
        "The code only runs for lengths that several roundings (of strided convolutions, say) leave whole, which the "
        'exporter cannot solve for. Trace a part of the model after them: pg.trace(model, example, root="...").',
    ),
    (
        r"in output, which is not a known type",
        "Return tensors, tuples, lists, dicts or a transformers ModelOutput; or register the class with "
        "torch.export.register_dataclass.",
    ),
)
FRAME = re.compile(r'File "(.+)", line (\d+), in (.+)')  # of a formatted traceback
# What makes a place in code: the code and the line.
CodeLine = tuple[CodeType, int]
OTHERWISE = (
    "Make that line work on tensors of symbolic size, or trace a part of the model without it: "
    'pg.trace(model, example, root="...").'
)
NOT_THE_MODEL = (
    *(str(Path(str(package.__file__)).parent) for package in (torch, sympy)),
    str(Path(__file__).parent.parent),
    "<",
)
EXPORT_LOCK = threading.RLock()  # of what all threads share and the exporter, and what stands around it here, patch
STANDARD_LIBRARY = sysconfig.get_path("stdlib")


def explain(model: nn.Module, error: BaseException) -> TraceError:
    """Return the error to raise for `error`, which the export of `model` raised."""
    reason = _reason(error)
    advice = next((advice for pattern, advice in ADVICE if re.search(pattern, f"{reason}\n{error}")), OTHERWISE)
    places = _places(model, error)
    where = _where(model, places)
    off = random_rates(model, places) if advice == ADVICE[0][1] else ""
    if re.search(r"data-dependent expression Eq\(u\d+, 1\)", reason) and places:
        code, line = places[0]
        name = f"{Path(code.co_filename).name}:{line}"
        advice += (
            f" If the inputs alone decide it and it is always the same for you, say which: assume={{{name!r}: False}} "
            "takes the truth that the line asks for to be false, and every call checks it."
        )
    advice = f"{off}, so that nothing is done at random there. Otherwise: {advice}" if off else advice
    return TraceError(f"{type(model).__name__} cannot be traced.\n{where}  why: {reason}\n  what to do: {advice}")


def _where(model: nn.Module, places: Sequence[CodeLine]) -> str:
    """Return the line of the model's own code, and the line of its library that was reached from there."""
    names = {type(module).__module__ for module in model.modules()}
    files = {getattr(sys.modules.get(name), "__file__", None) for name in names}
    own = next((place for place in places if place[0].co_filename in files), None)
    shown = places[:1] if own is None else list(dict.fromkeys((own, places[0])))
    return "".join(describe_line(code.co_filename, line, code.co_name) for code, line in shown)


def describe_line(file: str, line: int, function: str = "") -> str:
    """Format a line of code with its place, for lines of their own in a message."""
    inside = f", in {function}" if function else ""
    return f"  at {file}:{line}{inside}\n      {linecache.getline(file, line).strip()}\n"


def source_line(file: str, line: int, function: str) -> str:
    """Format a line of code with its place, for the middle of a sentence."""
    source = linecache.getline(file, line).strip()
    return f"{file}:{line}, in {function}" + (f": {source}" if source else "")


def line_of_nodes(nodes: Iterable[fx.Node]) -> str:
    """Return the line of the model's code at which these exported nodes start, as `describe_place` has it; "" if
    unknown."""
    for node in nodes:
        frames = FRAME.findall(node.meta.get("stack_trace") or "")
        model = [frame for frame in frames if is_model_code(frame[0])]
        if model:
            file, line, function = model[-1]
            return describe_line(file, int(line), function)
    return ""


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    first = next((line for line in lines if line), "")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _places(model: nn.Module, error: BaseException) -> list[CodeLine]:
    """Return the failing lines of the model's package, innermost first; else of code that is neither torch's nor
    ours."""
    packages = {type(module).__module__.partition(".")[0] for module in model.modules()} - {"torch"}
    fallback: list[CodeLine] = []
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        found: list[CodeLine] = []
        for frame, line in reversed(list(traceback.walk_tb(current.__traceback__))):
            if not is_model_code(frame.f_code.co_filename) or not linecache.getline(frame.f_code.co_filename, line):
                continue
            fallback.append((frame.f_code, line))
            if frame.f_globals.get("__name__", "").partition(".")[0] in packages:
                found.append((frame.f_code, line))
        if found:
            return found
        current = current.__cause__ or current.__context__
    return fallback


def random_rates(model: nn.Module, places: Sequence[CodeLine]) -> str:
    """Say how to switch off the randomness of a line: by the rates of the model's configuration that it reads."""
    config = getattr(model, "config", None)
    values = {key: value for key, value in vars(config).items() if _is_rate(value)} if config is not None else {}
    words: set[str] = set()
    for code, line in places[:1]:
        words |= set(re.findall(r"\.(\w+)", linecache.getline(code.co_filename, line)))
    for code, _ in places[:2]:
        words |= set(re.findall(r"config\.(\w+)", "".join(_source(code))))
    read = [key for key in values if any(key == word or key.endswith(f"_{word}") for word in words)]
    return "Set " + " and ".join(f"config.{key} ({values[key]}) to 0" for key in read) if read else ""


def _is_rate(value: object) -> bool:
    return isinstance(value, float) and 0 < value <= 1


def _source(code: CodeType) -> list[str]:
    try:
        return inspect.getsourcelines(code)[0]
    except OSError:  # code without a file
        return []


def is_model_code(file: str) -> bool:
    """Tell whether a file is neither torch's, nor the standard library's, nor ours."""
    library = file.startswith(STANDARD_LIBRARY) and "site-packages" not in file
    return not library and not file.startswith(NOT_THE_MODEL)


@contextmanager
def exporter_silenced() -> Iterator[None]:
    """Silence the exporter: its warnings, its log, and the graphs it prints when it fails. One thread at a time."""
    with EXPORT_LOCK:
        disabled = logging.root.manager.disable
        logging.disable(logging.ERROR)
        try:
            with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
                warnings.simplefilter("ignore")
                yield
        finally:
            logging.disable(disabled)
