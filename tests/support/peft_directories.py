"""Directories that peft writes and reads, beside the outputs of peft's own model."""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path
from typing import Any

import peft
import torch
import zoo
from torch import Tensor, nn

import peftgraph as pg

# peft asks the model in ways that transformers is about to rename, and remarks on ordinary things
QUIET = (
    ".is_gradient_checkpointing",
    "fan_in_fan_out is set to",
    "Model has `tie_word_embeddings=True`",
    "Setting `save_embedding_layers`",
    ".past_key_values. is deprecated",
    "The following",
)


def answer(output: Any) -> Tensor:
    """The logits, or the hidden states of a model without a head."""
    return output["logits"] if "logits" in output else output["last_hidden_state"]


def wrapped(name: str, config: peft.PeftConfig, model: nn.Module | None = None) -> Any:
    """peft's model on a fresh base in eval mode, with random values for all that trains."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(zoo.build(name) if model is None else model, config).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return theirs


def saved(theirs: Any, directory: Path) -> Path:
    """What peft's save_pretrained writes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(directory)
    return directory


def asked(model: Any, inputs: dict[str, Any]) -> Tensor:
    """What a model answers in evaluation."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return answer(model.eval()(**inputs))


def read_by_peft(name: str, directory: Path, model: nn.Module | None = None) -> Any:
    """peft's model from a directory, on a fresh base; whatever peft remarks on is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for words in QUIET:
            warnings.filterwarnings("ignore", message=words)
        return peft.PeftModel.from_pretrained(zoo.build(name) if model is None else model, directory).eval()


@cache
def positioned(name: str, start: int) -> tuple[pg.Program, dict[str, Tensor]]:
    """A program that takes positions, and those that count from `start` on."""
    positions = {"position_ids": torch.arange(start, start + 7).expand(3, -1)}
    return pg.trace(zoo.build(name), zoo.example(name) | positions), positions


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference over the largest magnitude."""
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())
