"""Trains the proof-reader: cross-entropy over the words of a sentence, AdamW, one pass over the data.

Shapes: B sentences, W words (padded).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from peftgraph.demo.proofreader import Proofreader, TokenisedPart, accuracy, map_sentences


@dataclass(frozen=True)
class Schedule:
    """How the proof-reader trains.

    Attributes:
        steps: optimiser steps.
        batch: sentences in a batch.
        rate: the peak learning rate of the adapter, after a linear warm-up over a tenth of the steps; it then decays
            linearly to 0.
        head_rate: the same for the head, which is new.
        decay: AdamW's weight decay.
        checks: how often the validation accuracy is measured.
    """

    steps: int = 110
    batch: int = 32
    rate: float = 2e-3
    head_rate: float = 3e-3
    decay: float = 0.01
    checks: int = 5


@dataclass
class Curve:
    """What was measured while training: (step, loss) at every step, (step, validation accuracy) at every check."""

    losses: list[tuple[int, float]] = field(default_factory=list)
    validations: list[tuple[int, float]] = field(default_factory=list)


def train(
    net: Proofreader,
    parts: Mapping[str, TokenisedPart],
    schedule: Schedule,
    seed: int,
    tick: Callable[[Curve], None] = lambda curve: None,
) -> Curve:
    """Train the parameters that require grad, for all steps; the last step counts, and nothing is chosen.

    The module stays in evaluation mode, so that the encoder's dropout is off: one pass over the data does not overfit.

    Args:
        net: the proof-reader to train, in place.
        parts: "train" and "validation".
        schedule: of the training.
        seed: of the order of the batches.
        tick: called with the curve so far after every step.
    """
    curve = Curve()
    net.eval()
    parameters = [p for p in net.parameters() if p.requires_grad]
    optimiser, scheduler = _optimiser(net, schedule)
    checks = {round(schedule.steps * (i + 1) / schedule.checks) for i in range(schedule.checks)}
    batches = _batches(parts["train"], schedule.batch, seed)
    for step, rows in zip(range(1, schedule.steps + 1), batches, strict=False):
        loss = nn.functional.cross_entropy(net(**parts["train"].batch(rows)), parts["train"].places_N[rows])
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        scheduler.step()
        curve.losses.append((step, float(loss.detach())))
        if step in checks:
            curve.validations.append((step, evaluate(net, parts["validation"])))
        tick(curve)
    return curve


def evaluate(net: Proofreader, part: TokenisedPart) -> float:
    """Return the accuracy on a part."""
    return accuracy(map_sentences(part, lambda batch: net(**batch)), part.places_N)


def _optimiser(net: Proofreader, schedule: Schedule) -> tuple[torch.optim.Optimizer, Any]:
    adapter = [p for p in net.encoder.parameters() if p.requires_grad]
    groups = [
        {"params": adapter, "lr": schedule.rate},
        {"params": list(net.head.parameters()), "lr": schedule.head_rate},
    ]
    optimiser = torch.optim.AdamW(groups, weight_decay=schedule.decay)
    warm = max(1, schedule.steps // 10)

    def factor(step: int) -> float:
        return min((step + 1) / warm, (schedule.steps - step) / max(1, schedule.steps - warm))

    return optimiser, torch.optim.lr_scheduler.LambdaLR(optimiser, factor)


def _batches(part: TokenisedPart, size: int, seed: int) -> Iterator[list[int]]:
    """Yield batches without end: each epoch is shuffled, and batches are made of sentences of similar length."""
    rng = random.Random(seed)
    size = min(size, len(part.ids))
    while True:
        rows = list(range(len(part.ids)))
        rng.shuffle(rows)
        stretches = [
            sorted(rows[i : i + 8 * size], key=lambda row: len(part.ids[row])) for i in range(0, len(rows), 8 * size)
        ]
        batches = [stretch[i : i + size] for stretch in stretches for i in range(0, len(stretch), size)]
        rng.shuffle(batches)
        yield from (batch for batch in batches if len(batch) == size)
