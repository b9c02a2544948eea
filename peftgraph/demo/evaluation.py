"""Evaluates on the test part, which is looked at once: a guess, the frozen head, the tuned proof-reader.

Shapes: N sentences, W words (padded).
"""

from __future__ import annotations

from dataclasses import asdict
from math import comb
from typing import Any

import torch
from torch import Tensor

from peftgraph.demo import terminal
from peftgraph.demo.baseline import Baseline
from peftgraph.demo.proofreader import accuracy
from peftgraph.demo.settings import Setup
from peftgraph.demo.slips import KINDS
from peftgraph.demo.training import Curve

EXAMPLES = 16  # sentences that the report shows
DISTANCES = ("on the slip", "one word off", "two words off", "further off")


def evaluate_on_test(setup: Setup, baseline: Baseline, frozen_NW: Tensor, tuned_NW: Tensor, curve: Curve) -> None:
    """Compute the accuracies on the test part, show them, and add them to the metrics.

    Args:
        setup: of the run.
        baseline: the frozen head.
        frozen_NW: its scores.
        tuned_NW: the tuned proof-reader's scores.
        curve: what was measured while training.
    """
    part = setup.parts["test"]
    slips = [exercise.slip for exercise in setup.dataset.parts["test"]]
    frozen_hits, tuned_hits = frozen_NW.argmax(-1) == part.places_N, tuned_NW.argmax(-1) == part.places_N
    only_tuned, only_frozen = int((tuned_hits & ~frozen_hits).sum()), int((frozen_hits & ~tuned_hits).sum())
    kinds = {kind: torch.tensor([slip.kind == kind for slip in slips]) for kind in KINDS}
    setup.metrics["accuracy"] = {
        "chance": sum(1 / len(slip.words) for slip in slips) / len(slips),
        "frozen": accuracy(frozen_NW, part.places_N),
        "tuned": accuracy(tuned_NW, part.places_N),
        "tests": len(slips),
        "only_tuned_right": only_tuned,
        "only_frozen_right": only_frozen,
        "p": mcnemar(only_tuned, only_frozen),
        "frozen_validation": baseline.validation,
        "frozen_decay": baseline.decay,
        "tuned_validation": curve.validations[-1][1],
        "per_kind": [
            [kind, _share(frozen_hits, rows_N), _share(tuned_hits, rows_N), int(rows_N.sum())]
            for kind, rows_N in kinds.items()
        ],
        "distance": _distances(frozen_NW, tuned_NW, part.places_N),
    }
    setup.metrics["curve"] = asdict(curve)
    setup.metrics["examples"] = _examples(setup, frozen_NW, tuned_NW)
    terminal.accuracies(setup.metrics["accuracy"])
    terminal.sentences(setup.metrics["examples"])


def mcnemar(wins: int, losses: int) -> float:
    """Return the two-sided p-value of McNemar's exact test: the probability of a split at least as uneven by chance."""
    total, larger = wins + losses, max(wins, losses)
    tail = sum(comb(total, k) for k in range(larger, total + 1))
    return min(1.0, 2 * tail / 2**total)


def _share(hits_N: Tensor, rows_N: Tensor) -> float:
    return float(hits_N[rows_N].float().mean()) if bool(rows_N.any()) else 0.0


def _distances(frozen_NW: Tensor, tuned_NW: Tensor, places_N: Tensor) -> list[list[Any]]:
    """Return how many words off the slip the answers are: for each distance, the shares of both."""
    off = [(scores.argmax(-1) - places_N).abs().clamp_max(len(DISTANCES) - 1) for scores in (frozen_NW, tuned_NW)]
    return [[name, *(float((one == i).float().mean()) for one in off)] for i, name in enumerate(DISTANCES)]


def _examples(setup: Setup, frozen_NW: Tensor, tuned_NW: Tensor) -> list[dict[str, Any]]:
    """Return the answers for the first sentences of the shuffled test part, so that none is chosen by hand."""
    chances_NW = tuned_NW.softmax(-1)
    return [
        {
            "words": list(exercise.slip.words),
            "place": exercise.slip.place,
            "kind": exercise.slip.kind,
            "meant": exercise.slip.meant,
            "module": exercise.sentence.module,
            "frozen": int(frozen_NW[i].argmax()),
            "tuned": int(tuned_NW[i].argmax()),
            "chance": float(chances_NW[i].max()),
        }
        for i, exercise in enumerate(setup.dataset.parts["test"][:EXAMPLES])
    ]
