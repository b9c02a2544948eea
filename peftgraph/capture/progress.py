"""How far a trace has come, told to whoever asks: a callable, since nobody but the caller knows where to show it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

# Called with the phase, how many of its steps have begun, and how many there are (0 where that is unknown).
Progress = Callable[[str, int, int], None]


def no_progress(phase: str, begun: int, total: int) -> None:
    """Tells nobody."""


@contextmanager
def report_layers(model: nn.Module, phase: str, progress: Progress) -> Iterator[None]:
    """Tells of every repeated child of `model` (a layer) when its forward begins."""
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
    """The members of the outermost lists of modules; what they hold in lists of their own is part of them."""
    found: list[nn.Module | None] = []
    for child in module.children():
        found += list(child) if isinstance(child, nn.ModuleList) and len(child) > 1 else _repeated(child)
    return [one for one in found if one is not None]  # a list may hold places for what is left out
