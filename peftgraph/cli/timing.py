"""Latency as ratios: variants take turns in one process, so that a busy machine hurts all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch


def interleaved(variants: Mapping[str, Callable[[], object]], rounds: int, warm: int = 2) -> dict[str, float]:
    """The median seconds of each variant over rounds in which every one runs once, in an order that rotates."""
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
    return {name: statistics.median(values) for name, values in seconds.items()}
