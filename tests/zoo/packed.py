"""Calls of models that take the patches of all pictures in one row, beside the grid of each picture.

What such a model works out from the grids, counted in numbers of Python, is given to it as inputs, as the library
means it to be done for a model that is traced.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import vision_utils

GRID = (1, 4, 12)  # frames, rows and columns of patches; three rows of words hold an equal part of the tokens
PICTURES = 2  # each is an attention of its own in each layer, of a size that only its grid tells
# The functions of the library that read grids, and the names under which a model takes what they return.
DERIVED: dict[str, tuple[str, ...]] = {
    "get_vision_cu_seqlens": ("cu_seqlens",),
    "get_vision_position_ids": ("position_ids",),
    "get_vision_window_index": ("window_index", "cu_window_seqlens"),
    "get_vision_interpolation_indices_and_weights": ("interp_indices", "interp_weights"),
    "get_vision_nearest_position_ids": ("position_ids",),
}


def patches(config: Any, pictures: int) -> Iterator[tuple[int, ...]]:
    """Shapes that the row of patches may have."""
    count = pictures * GRID[0] * GRID[1] * GRID[2]
    channels = next(
        (getattr(config, name) for name in ("in_channels", "num_channels", "in_chans") if _has(config, name)), 3
    )
    size = config.patch_size if isinstance(config.patch_size, int) else config.patch_size[0]
    frames = getattr(config, "temporal_patch_size", 1)
    for depth in dict.fromkeys((frames if isinstance(frames, int) else frames[0], 1, 2)):
        yield (count, channels * depth * size * size)
    yield (count, channels, size, size)
    yield (1, count, channels, size, size)


def _has(config: Any, name: str) -> bool:
    return isinstance(getattr(config, name, None), int)


def derived(model: nn.Module, call: dict[str, Any], prefix: str) -> dict[str, torch.Tensor]:
    """What one call of `model` works out from the grids, by the names under which the model takes it."""
    found: dict[str, torch.Tensor] = {}
    with torch.no_grad(), _recorded(model, found):
        model(**call)
    return {prefix + name: value for name, value in found.items()}


@contextmanager
def _recorded(model: nn.Module, found: dict[str, torch.Tensor]) -> Iterator[None]:
    places = [vision_utils, *{sys.modules[type(module).__module__] for module in model.modules()}]
    held = [(place, name, getattr(place, name)) for place in places for name in DERIVED if hasattr(place, name)]

    def wrapped(function: Any, names: tuple[str, ...]) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            found.update(zip(names, result if isinstance(result, tuple) else (result,), strict=True))
            return result

        return call

    try:
        for place, name, function in held:
            setattr(place, name, wrapped(function, DERIVED[name]))
        yield
    finally:
        for place, name, function in held:
            setattr(place, name, function)
