"""Dropout that keeps the state of the random generator instead of its mask.

The state is a few kilobytes on a CPU and some bytes on other devices, whatever the size of the values. A dropout is a
product with random factors, 0 or 1 / (1 - p); the backward pass draws the factors again from the state, once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

aten = torch.ops.aten
DROPOUT = aten.dropout.default
STATE_BYTES = {"cpu": 5056}  # of the generator of a device; 16 elsewhere


def generator_state(device: torch.device) -> Tensor:
    """Return the state of a device's default generator: (bytes,) uint8 on the CPU."""
    return torch.get_rng_state() if device.type == "cpu" else getattr(torch, device.type).get_rng_state(device)


def set_generator_state(device: torch.device, state: Tensor) -> None:
    """Set the state of a device's default generator."""
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        getattr(torch, device.type).set_rng_state(state, device)


@contextmanager
def from_state(device: torch.device, state: Tensor) -> Iterator[None]:
    """Draw random numbers from `state` within the context, and go on afterwards as if none had been drawn."""
    before = generator_state(device)
    set_generator_state(device, state)
    try:
        yield
    finally:
        set_generator_state(device, before)


def draw_state(x: Tensor) -> Tensor:
    """Return the state of the generator from which a dropout of `x` is about to draw."""
    return generator_state(x.device)


def first_noise(x: Tensor, state: Tensor, p: float) -> Tensor:
    """Return the factors of a dropout of `x` with probability `p`; the generator is in `state`, and moves on."""
    return aten.dropout.default(torch.ones_like(x), p, True)


def repeated_noise(x: Tensor, state: Tensor, p: float) -> Tensor:
    """Return the factors that `first_noise` returned from this state; the generator does not move."""
    with from_state(x.device, state):
        return aten.dropout.default(torch.ones_like(x), p, True)


@torch.library.custom_op("peftgraph::draw_state", mutates_args=())
def _draw_state(x: Tensor) -> Tensor:
    return draw_state(x)


@_draw_state.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty(STATE_BYTES.get(x.device.type, 16), dtype=torch.uint8)


@torch.library.custom_op("peftgraph::dropout_noise", mutates_args=())
def _noise(x: Tensor, state: Tensor, p: float) -> Tensor:
    return repeated_noise(x, state, p)


@_noise.register_fake
def _(x: Tensor, state: Tensor, p: float) -> Tensor:
    return torch.empty_like(x)


DRAW_STATE = torch.ops.peftgraph.draw_state.default
SEEDED_NOISE = torch.ops.peftgraph.dropout_noise.default


def traced_dropout(x: Tensor, p: float, train: bool = True) -> Tensor:
    """Drop values of `x`, by operations that a joint graph records; stands for `aten.dropout` while it is traced."""
    if not train or p == 0.0:
        return x
    fixed = x.detach()
    return x * SEEDED_NOISE(fixed, DRAW_STATE(fixed), p)


def traced_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, p: float = 0.0, is_causal: bool = False,
    *, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """Attend with dropout of the weights, in the operations of torch's own formula for it."""
    if p == 0.0:
        return aten.scaled_dot_product_attention.default(
            query, key, value, mask, p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    if is_causal:
        mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(mask.logical_not(), -math.inf)
    factor = math.sqrt(scale if scale is not None else 1.0 / math.sqrt(query.shape[-1]))
    scores = torch.matmul(query * factor, (key * factor).transpose(-2, -1))
    weights = torch.softmax(scores if mask is None else scores + mask, -1)
    return torch.matmul(traced_dropout(weights, p), value)
