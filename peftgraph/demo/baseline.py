"""Fits the baseline that tuning must beat: the best linear head on the frozen encoder's embeddings.

Shapes: N sentences, D features, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peftgraph.demo.classifier import accuracy

DECAYS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


@dataclass(frozen=True)
class Baseline:
    """The best linear head on frozen embeddings; `decay` was chosen by its accuracy on the validation part."""

    head: nn.Linear
    decay: float
    validation: float


def fit_baseline(embeddings: Mapping[str, Tensor], labels: Mapping[str, Tensor], classes: int) -> Baseline:
    """Fit the head to convergence for every weight decay and keep the one with the best validation accuracy.

    Features are standardised for fitting, so that a decay means the same for all of them. The standardisation is folded
    into the head that is returned, which takes plain embeddings.

    Args:
        embeddings: part -> (N, D).
        labels: part -> (N,).
        classes: C.
    """
    mean_D, deviation_D = embeddings["train"].mean(0), embeddings["train"].std(0).clamp_min(1e-6)
    best: Baseline | None = None
    for decay in DECAYS:
        head = _fit((embeddings["train"] - mean_D) / deviation_D, labels["train"], classes, decay)
        with torch.no_grad():
            head.weight.div_(deviation_D)
            head.bias.sub_(head.weight @ mean_D)
            found = accuracy(head(embeddings["validation"]), labels["validation"])
        if best is None or found > best.validation:
            best = Baseline(head, decay, found)
    assert best is not None
    return best


def _fit(x_ND: Tensor, labels_N: Tensor, classes: int, decay: float) -> nn.Linear:
    head = nn.Linear(x_ND.shape[1], classes)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimiser = torch.optim.LBFGS(head.parameters(), max_iter=500, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(head(x_ND), labels_N) + decay * head.weight.square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    return head
