"""Latency as ratios: variants take turns in one process, so that a busy machine hurts all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch


def interleaved(variants: Mapping[str, Callable[[], object]], rounds: int, warm: int = 2) -> dict[str, list[float]]:
    """The seconds of each variant in every round; in a round each runs once, in an order that rotates."""
    names = list(variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with torch.inference_mode():
        for _ in range(warm):
            for run in variants.values():
                run()
        for turn in range(rounds):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                start = time.perf_counter()
                variants[name]()
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: Sequence[float], base: Sequence[float]) -> tuple[float, float, float]:
    """The ratio of the medians, and the quartiles of the rounds' own ratios: how far the ratio can be trusted."""
    each = [a / b for a, b in zip(seconds, base, strict=True)]
    quartiles = statistics.quantiles(each, n=4) if len(each) > 1 else each * 3
    return statistics.median(seconds) / statistics.median(base), quartiles[0], quartiles[2]
