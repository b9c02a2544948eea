"""Fits the baseline that tuning must beat: the best linear head on the states of the frozen encoder.

It sees all that the tuned model sees: every sentence of the training part, with the same slip.

Shapes: N sentences, W words (padded), D features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peftgraph.demo.proofreader import TokenisedPart, accuracy

DECAYS = (0.0, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3)


@dataclass(frozen=True)
class Baseline:
    """The best linear head on frozen states; `decay` was chosen by its accuracy on the validation part."""

    head: nn.Linear
    decay: float
    validation: float


def word_mask(part: TokenisedPart, width: int) -> Tensor:
    """Return which words a part's sentences have, (N, W)."""
    lengths_N = torch.tensor([len(first) for first in part.first])
    return torch.arange(width) < lengths_N[:, None]


def fit_baseline(states: Mapping[str, Tensor], parts: Mapping[str, TokenisedPart]) -> Baseline:
    """Fit the head to convergence for every weight decay and keep the one with the best validation accuracy.

    Features are standardised for fitting, so that a decay means the same for all of them. The standardisation is folded
    into the head that is returned, which takes plain states.

    Args:
        states: part -> (N, W, D).
        parts: "train" and "validation".
    """
    masks = {name: word_mask(parts[name], states[name].shape[1]) for name in ("train", "validation")}
    every_ED = states["train"][masks["train"]]
    mean_D, deviation_D = every_ED.mean(0), every_ED.std(0).clamp_min(1e-6)
    inputs_NWD = (states["train"] - mean_D) / deviation_D
    best: Baseline | None = None
    for decay in DECAYS:
        head = _fit(inputs_NWD, masks["train"], parts["train"].places_N, decay)
        with torch.no_grad():
            head.weight.div_(deviation_D)  # the mean adds the same to all words of a sentence
            scores_NW = head(states["validation"]).squeeze(-1).masked_fill(~masks["validation"], -torch.inf)
        found = accuracy(scores_NW, parts["validation"].places_N)
        if best is None or found > best.validation:
            best = Baseline(head, decay, found)
    assert best is not None
    return best


def _fit(x_NWD: Tensor, mask_NW: Tensor, places_N: Tensor, decay: float) -> nn.Linear:
    head = nn.Linear(x_NWD.shape[-1], 1, bias=False)
    nn.init.zeros_(head.weight)
    optimiser = torch.optim.LBFGS(head.parameters(), max_iter=300, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        scores_NW = head(x_NWD).squeeze(-1).masked_fill(~mask_NW, -torch.inf)
        loss = nn.functional.cross_entropy(scores_NW, places_N) + decay * head.weight.square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    return head
