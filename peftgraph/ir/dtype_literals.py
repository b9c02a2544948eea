"""Tracks literals that depend on the model's dtype and device.

Tracing stores `x.to(weight.dtype)`, `torch.finfo(x.dtype).min` and `arange(device=x.device)` as literals. A model is
traced under a marker dtype that its own code does not name, so a literal equal to the marker came from the
parameters and must change with them, while a float32 upcast inside a norm was intended and stays. Each node records
in `meta["follows"]` which of its arguments depend on the parameters' dtype, and how.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from peftgraph.ir.quantised import ROUNDS

# How a literal is computed from the model's dtype, by the name that is recorded. "wide" is never read off a trace:
# passes ask for it where an operation has no half precision.
LITERAL_FORMS: dict[str, Callable[[torch.dtype], Any]] = {
    "dtype": lambda dtype: dtype,
    "wide": lambda dtype: torch.promote_types(dtype, torch.float32),
    "complex": lambda dtype: dtype.to_complex(),
    "min": lambda dtype: torch.finfo(dtype).min,
    "max": lambda dtype: torch.finfo(dtype).max,
    "tiny": lambda dtype: torch.finfo(dtype).tiny,
    "eps": lambda dtype: torch.finfo(dtype).eps,
}

Path = tuple[str, int | str]  # ("args", position) or ("kwargs", name)


def record_literals(graph: fx.Graph, marker: torch.dtype) -> None:
    """Record on every node which of its literals are `marker` or one of its numeric limits."""
    values = {form: compute(marker) for form, compute in LITERAL_FORMS.items() if form not in ("complex", "wide")}
    if marker in (torch.float16, torch.float32, torch.float64):
        values["complex"] = marker.to_complex()
    for node in graph.nodes:
        found = tuple(
            (path, form)
            for path, value in _literals(node)
            for form, literal in values.items()
            if type(value) is type(literal) and value == literal
        )
        if found:
            node.meta["follows"] = found


def convert_literals(graph: fx.Graph, dtype: torch.dtype | None, device: torch.device | None) -> None:
    """Set, in place, recorded literals to those of `dtype`, and every device literal to `device`."""
    for node in graph.nodes:
        if dtype is not None and not (node.meta.get(ROUNDS) and dtype == torch.float64):
            for path, form in node.meta.get("follows", ()):
                _set(node, path, LITERAL_FORMS[form](dtype))
        if device is not None:
            for path, value in _literals(node):
                if isinstance(value, torch.device):
                    _set(node, path, device)


def widen_literals(graph: fx.Graph) -> None:
    """Set, in place, every floating dtype literal to float64, so that upcasts in the model do not round a proof."""
    for node in graph.nodes:
        if node.meta.get(ROUNDS):
            continue
        for path, value in _literals(node):
            if isinstance(value, torch.dtype) and value.is_floating_point:
                _set(node, path, torch.float64)
    convert_literals(graph, torch.float64, None)


def _literals(node: fx.Node) -> list[tuple[Path, Any]]:
    if node.op != "call_function":
        return []
    positional: list[tuple[Path, Any]] = [(("args", i), value) for i, value in enumerate(node.args)]
    return positional + [(("kwargs", name), value) for name, value in node.kwargs.items()]


def _set(node: fx.Node, path: Path, value: Any) -> None:
    where, key = path
    if where == "args":
        assert isinstance(key, int)
        node.update_arg(key, value)
    else:
        node.update_kwarg(str(key), value)
