"""Holds what a run of the quickstart depends on, and what its steps share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftgraph.demo.dataset import Dataset
from peftgraph.demo.proofreader import TokenisedPart
from peftgraph.demo.rerun_exports import RUNNERS
from peftgraph.demo.training import Schedule

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RECIPE = "lora{at=attention.*|ffn.* rank=8 alpha=16}; ia3{}"
LIMITS: Mapping[str, int] = {"train": 3520, "validation": 320, "test": 1000}  # sentences of each part


@dataclass(frozen=True)
class Settings:
    """What a run of the quickstart depends on; equal settings give equal numbers, times apart.

    Attributes:
        out: the folder that is written.
        seed: of the data set, its split, the slips, the adapter and the order of the batches.
        recipe: the passes, as a spec.
        limits: the most sentences of each part.
        schedule: of the training.
        rounds: how often each program is timed, at batch 1 and at batch 32.
        exports: the suffixes of the files that are exported and run again.
    """

    out: Path
    seed: int = 0
    recipe: str = RECIPE
    limits: Mapping[str, int] = field(default_factory=lambda: dict(LIMITS))
    schedule: Schedule = field(default_factory=Schedule)
    rounds: tuple[int, int] = (40, 8)
    exports: tuple[str, ...] = tuple(RUNNERS)


@dataclass(frozen=True)
class Setup:
    """What every step of a run works on, and the metrics that it adds to."""

    settings: Settings
    model: PreTrainedModel
    dataset: Dataset
    parts: dict[str, TokenisedPart]
    metrics: dict[str, Any]
