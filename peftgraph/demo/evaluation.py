"""Evaluates on the test part, which is looked at once: majority class, frozen head, tuned classifier.

Shapes: N sentences, C classes.
"""

from __future__ import annotations

from dataclasses import asdict
from math import comb
from typing import Any

import torch
from torch import Tensor

from peftgraph.demo import terminal
from peftgraph.demo.baseline import Baseline
from peftgraph.demo.classifier import accuracy
from peftgraph.demo.settings import Setup
from peftgraph.demo.training import Curve

EXAMPLES = 12  # predictions that the report shows


def evaluate_on_test(setup: Setup, baseline: Baseline, frozen_NC: Tensor, tuned_NC: Tensor, curve: Curve) -> None:
    """Compute the accuracies on the test part, show them, and add them to the metrics.

    Args:
        setup: of the run.
        baseline: the frozen head.
        frozen_NC: its scores.
        tuned_NC: the tuned classifier's scores.
        curve: what was measured while training.
    """
    labels_N = setup.parts["test"].labels_N
    families = setup.dataset.families
    majority = int(setup.parts["train"].labels_N.bincount(minlength=len(families)).argmax())
    frozen_hits, tuned_hits = frozen_NC.argmax(-1) == labels_N, tuned_NC.argmax(-1) == labels_N
    matrix = torch.zeros(len(families), len(families), dtype=torch.long)
    matrix.index_put_((labels_N, tuned_NC.argmax(-1)), torch.ones_like(labels_N), accumulate=True)
    only_tuned, only_frozen = int((tuned_hits & ~frozen_hits).sum()), int((frozen_hits & ~tuned_hits).sum())
    setup.metrics["accuracy"] = {
        "majority": float((labels_N == majority).float().mean()),
        "frozen": accuracy(frozen_NC, labels_N),
        "tuned": accuracy(tuned_NC, labels_N),
        "tests": len(labels_N),
        "only_tuned_right": only_tuned,
        "only_frozen_right": only_frozen,
        "p": sign_test(only_tuned, only_frozen),
        "frozen_validation": baseline.validation,
        "frozen_decay": baseline.decay,
        "tuned_validation": curve.validations[-1][1],
        "per_family": [
            [name, _share(frozen_hits, labels_N == i), _share(tuned_hits, labels_N == i)]
            for i, name in enumerate(families)
        ],
        "confusion": matrix.tolist(),
    }
    setup.metrics["curve"] = asdict(curve)
    setup.metrics["examples"] = _examples(setup, frozen_NC, tuned_NC)
    terminal.accuracies(setup.metrics["accuracy"])


def sign_test(wins: int, losses: int) -> float:
    """Return the two-sided p-value of the exact sign test: the probability of a split at least as uneven by chance."""
    total, larger = wins + losses, max(wins, losses)
    tail = sum(comb(total, k) for k in range(larger, total + 1)) / 2**total
    return min(1.0, 2 * tail)


def _share(hits_N: Tensor, rows_N: Tensor) -> float:
    return float(hits_N[rows_N].float().mean()) if bool(rows_N.any()) else 0.0


def _examples(setup: Setup, frozen_NC: Tensor, tuned_NC: Tensor) -> list[dict[str, Any]]:
    """Return predictions for the first sentences of the shuffled test part, so that none is chosen by hand."""
    families = setup.dataset.families
    chances_NC = tuned_NC.softmax(-1)
    return [
        {
            "text": sentence.text,
            "module": sentence.module,
            "family": sentence.family,
            "frozen": families[int(frozen_NC[i].argmax())],
            "tuned": families[int(tuned_NC[i].argmax())],
            "chance": float(chances_NC[i].max()),
        }
        for i, sentence in enumerate(setup.dataset.parts["test"][:EXAMPLES])
    ]
