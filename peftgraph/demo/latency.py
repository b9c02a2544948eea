"""Measures latency as ratios: variants take turns in one process, so that a busy machine slows all of them alike."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import peftgraph as pg
from peftgraph.demo.proofreader import TokenisedPart
from peftgraph.terminal.console import working

BATCHES = (1, 32)


def measure_latency(
    programs: Mapping[str, pg.Program], part: TokenisedPart, rounds: Sequence[int]
) -> list[dict[str, Any]]:
    """Time programs at batch sizes 1 and 32; ratios are relative to the first program.

    Args:
        programs: name -> program.
        part: where the sentences are taken from: of at least median length.
        rounds: how often each program runs, at each batch size.

    Returns:
        For each batch size its number of tokens, and the median time and the ratio of every program.
    """
    # Copies: two variants that share weights would warm the caches for each other.
    nets = {name: copy.deepcopy(program.module()).eval() for name, program in programs.items()}
    reference, *_ = programs
    by_length = sorted(range(len(part.ids)), key=lambda row: len(part.ids[row]))
    found: list[dict[str, Any]] = []
    for size, count in zip(BATCHES, rounds, strict=True):
        batch = part.inputs(by_length[len(by_length) // 2 :][:size] or by_length)
        with working(f"timing at batch {size}"):
            seconds = run_interleaved({name: _call(net, batch) for name, net in nets.items()}, count)
        found.append(
            {
                "batch": size,
                "tokens": batch["input_ids"].shape[1],
                "rounds": count,
                "milliseconds": {name: 1000 * statistics.median(values) for name, values in seconds.items()},
                "ratio": {name: ratio(values, seconds[reference]) for name, values in seconds.items()},
            }
        )
    return found


def _call(net: nn.Module, batch: dict[str, Tensor]) -> Callable[[], object]:
    return lambda: net(**batch)


def run_interleaved(variants: Mapping[str, Callable[[], object]], rounds: int, warm: int = 2) -> dict[str, list[float]]:
    """Return the seconds of each variant in every round; in a round each runs once, in an order that rotates."""
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
    """Return the ratio of the medians, and the lower and upper quartile of the ratios of single rounds."""
    each = [a / b for a, b in zip(seconds, base, strict=True)]
    quartiles = statistics.quantiles(each, n=4) if len(each) > 1 else each * 3
    return statistics.median(seconds) / statistics.median(base), quartiles[0], quartiles[2]
