"""Trains the classifier: cross-entropy with a contrastive loss, AdamW, and averaging with the start at the end.

Shapes: B sentences, D features.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from peftgraph.demo.classifier import Batch, Classifier, TokenisedPart, accuracy, map_sentences


@dataclass(frozen=True)
class Schedule:
    """How the classifier trains.

    Attributes:
        steps: optimiser steps.
        batch: sentences in a batch.
        rate: the peak learning rate of the adapter, after a linear warm-up over a tenth of the steps; it then decays
            linearly.
        head_rate: the same for the head.
        decay: AdamW's weight decay.
        dropout: on the sentence's embedding.
        smoothing: of the labels.
        contrast: the weight of the contrastive loss, which pulls sentences of one family together in embedding space.
        temperature: of the contrastive loss.
        share: the share of the learned change that is kept: the final weights are interpolated between start and end.
            Less than 1 generalises better to modules that training never saw (Wortsman et al., 2022).
        checks: how often the validation accuracy is measured.
    """

    steps: int = 120
    batch: int = 32
    rate: float = 3e-3
    head_rate: float = 1e-3
    decay: float = 0.01
    dropout: float = 0.2
    smoothing: float = 0.1
    contrast: float = 1.0
    temperature: float = 0.2
    share: float = 0.6
    checks: int = 5


@dataclass
class Curve:
    """What was measured while training: (step, loss) at every step, (step, validation accuracy) at every check."""

    losses: list[tuple[int, float]] = field(default_factory=list)
    validations: list[tuple[int, float]] = field(default_factory=list)


def train(
    net: Classifier,
    parts: Mapping[str, TokenisedPart],
    schedule: Schedule,
    seed: int,
    tick: Callable[[Curve], None] = lambda curve: None,
) -> Curve:
    """Train the parameters that require grad, for all steps; nothing is chosen by the validation part.

    The last validation accuracy is measured after the weights were interpolated back towards their start.

    Args:
        net: the classifier to train, in place.
        parts: "train" and "validation".
        schedule: of the training.
        seed: of the order of the batches.
        tick: called with the curve so far after every step.
    """
    curve = Curve()
    parameters = [p for p in net.parameters() if p.requires_grad]
    optimiser, scheduler = _optimiser(net, schedule)
    start = [p.detach().clone() for p in parameters]
    curve.validations.append((0, evaluate(net, parts["validation"])))
    checks = {round(schedule.steps * (i + 1) / schedule.checks) for i in range(schedule.checks)}
    batches = _batches(parts["train"], schedule.batch, seed)
    for step, rows in zip(range(1, schedule.steps + 1), batches, strict=False):
        net.train()
        loss = _loss(net, parts["train"].batch(rows), parts["train"].labels_N[rows], schedule)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        scheduler.step()
        curve.losses.append((step, float(loss.detach())))
        if step in checks:
            curve.validations.append((step, evaluate(net, parts["validation"])))
        tick(curve)
    with torch.no_grad():
        for parameter, first in zip(parameters, start, strict=True):
            parameter.copy_(first.lerp(parameter, schedule.share))
    curve.validations.append((schedule.steps, evaluate(net, parts["validation"])))
    tick(curve)
    return curve


def _loss(net: Classifier, batch: Batch, labels_B: Tensor, schedule: Schedule) -> Tensor:
    embeddings_BD = net.embed(**batch)
    loss = nn.functional.cross_entropy(net.classify(embeddings_BD), labels_B, label_smoothing=schedule.smoothing)
    if schedule.contrast:
        loss = loss + schedule.contrast * contrastive_loss(embeddings_BD, labels_B, schedule.temperature)
    return loss


def contrastive_loss(embeddings_BD: Tensor, labels_B: Tensor, temperature: float) -> Tensor:
    """Compute the supervised contrastive loss (Khosla et al., 2020, equation 2).

    For each sentence: the mean of -log p over the other sentences of its family, where p is a softmax over all other
    sentences of the batch by cosine similarity. Sentences that are alone in their family do not count.
    """
    unit_BD = nn.functional.normalize(embeddings_BD, dim=-1)
    itself_BB = torch.eye(len(labels_B), dtype=torch.bool)
    scores_BB = (unit_BD @ unit_BD.T / temperature).masked_fill(itself_BB, -1e9)
    logs_BB = scores_BB - scores_BB.logsumexp(1, keepdim=True)
    positives_BB = (labels_B[:, None] == labels_B) & ~itself_BB
    count_B = positives_BB.sum(1)
    each_B = -(logs_BB * positives_BB).sum(1) / count_B.clamp_min(1)
    return each_B.sum() / (count_B > 0).sum().clamp_min(1)


def evaluate(net: Classifier, part: TokenisedPart) -> float:
    """Return the accuracy on a part, in eval mode."""
    net.eval()
    return accuracy(map_sentences(part, lambda batch: net(**batch)), part.labels_N)


def _optimiser(net: Classifier, schedule: Schedule) -> tuple[torch.optim.Optimizer, Any]:
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
