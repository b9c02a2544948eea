"""Holds what a run of the quickstart depends on, and what its steps share."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftgraph.demo.classifier import TokenisedPart
from peftgraph.demo.dataset import Dataset
from peftgraph.demo.rerun_exports import RUNNERS
from peftgraph.demo.training import Schedule

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RECIPE = "lora{at=attention.*|ffn.* rank=8 alpha=16 dropout=0.1}; ia3{}"
LONGEST = 64  # tokens


@dataclass(frozen=True)
class Settings:
    """What a run of the quickstart depends on; equal settings give equal numbers, times apart.

    Attributes:
        out: the folder that is written.
        seed: of the data set, its split, the adapter and the order of the batches.
        recipe: the passes, as a spec.
        per_module: the most sentences of one module of the standard library.
        per_family: the most sentences of one family.
        schedule: of the training.
        rounds: how often each program is timed, at batch 1 and at batch 32.
        exports: the suffixes of the files that are exported and run again.
    """

    out: Path
    seed: int = 0
    recipe: str = RECIPE
    per_module: int = 40
    per_family: int = 500
    schedule: Schedule = field(default_factory=Schedule)
    rounds: tuple[int, int] = (60, 15)
    exports: tuple[str, ...] = tuple(RUNNERS)


@dataclass(frozen=True)
class Setup:
    """What every step of a run works on, and the metrics that it adds to."""

    settings: Settings
    model: PreTrainedModel
    dataset: Dataset
    parts: dict[str, TokenisedPart]
    metrics: dict[str, Any]
