"""The progress of a trace, reported to a callable of the caller's."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

from peftgraph.utils.terminal_line import CLEAR_REST, PATIENCE, shown_elsewhere

# Called with the phase, how many of its steps have begun, and how many there are (0 where that is unknown).
Progress = Callable[[str, int, int], None]


def no_progress(phase: str, begun: int, total: int) -> None:
    """Report nothing."""


@contextmanager
def line_on_terminal() -> Iterator[Progress]:
    """Yield what shows the progress in one line on standard error, once it has taken PATIENCE seconds, and removes the
    line at the end; nothing is shown where standard error is no terminal."""
    stream, start, shown = sys.stderr, time.monotonic(), False
    if shown_elsewhere.get() or not stream.isatty():
        yield no_progress
        return

    def show(phase: str, begun: int, total: int) -> None:
        nonlocal shown
        if time.monotonic() - start > PATIENCE:
            steps = f", layer {begun} of {total}" if begun else ""
            text = f"tracing: {phase}{steps} ..."
            end = "\n" if len(text) >= shutil.get_terminal_size().columns else ""  # a remark, which stays
            stream.write(f"\r{text}{CLEAR_REST}{end}")
            stream.flush()
            shown = True

    try:
        yield show
    finally:
        if shown:
            stream.write(f"\r{CLEAR_REST}")
            stream.flush()


@contextmanager
def report_layers(model: nn.Module, phase: str, progress: Progress) -> Iterator[None]:
    """Report every repeated child of `model` (a layer) when its forward begins."""
    layers = _repeated(model)
    progress(phase, 0, len(layers))

    def begins(number: int, *_: Any) -> None:
        progress(phase, number, len(layers))

    handles = [layer.register_forward_pre_hook(partial(begins, i)) for i, layer in enumerate(layers, 1)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _repeated(module: nn.Module) -> list[nn.Module]:
    """Return the members of the outermost lists of modules; lists inside members are not searched."""
    found: list[nn.Module | None] = []
    for child in module.children():
        found += list(child) if isinstance(child, nn.ModuleList) and len(child) > 1 else _repeated(child)
    return [one for one in found if one is not None]  # a list may hold places for what is left out
