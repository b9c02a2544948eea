"""Compares and transfers prompts: initialises one from another task's, and finds the most similar tasks (SPoT).

A prompt is (L, D), L rows of D features, which `Prompt` trains and P-tuning's encoder computes. A prompt of a source
task initialises that of the target task; sources are ranked by the cosine similarity of prompts, of their mean rows or
of all pairs of rows. Source: arXiv 2110.07904 (Vu et al., 2022).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from peftgraph.errors import PeftGraphError
from peftgraph.ir.program import ProgramData
from peftgraph.rewrite.finalize import derived_values

LEAF = "prompt"
Comparison = Literal["mean", "rows"]


def prompt_of(program: ProgramData, name: str = "") -> Tensor:
    """Return a copy of a prompt's rows (L, D): those that a pass of the program stores, or that its encoder computes.

    Args:
        program: a program with a prompt.
        name: of the pass, where there are several.

    Raises:
        PeftGraphError: there is no such prompt, or several.
    """
    return _prompts(program)[_only(program, name)].clone()


def start(program: ProgramData, prompt: Tensor, name: str = "") -> None:
    """Copy another task's prompt (L, D) into the program's own, in place.

    Raises:
        PeftGraphError: the program has no such prompt or several, an encoder computes its rows, or the shapes differ.
    """
    which = _only(program, name)
    if which not in program.table:
        raise PeftGraphError(f"An encoder makes the rows of {which}; finalize() the program first.")
    own = program.table[which].tensor
    if own.shape != prompt.shape:
        raise PeftGraphError(f"{which} is {_sizes(own)}, the prompt to start from {_sizes(prompt)}.")
    with torch.no_grad():
        own.copy_(prompt)


def similarity(a: Tensor, b: Tensor, by: Comparison = "mean") -> float:
    """Compute the similarity of two prompts (L, D) and (M, D), from -1 to 1.

    Args:
        a: one prompt.
        b: the other.
        by: the cosine of their "mean" rows, or the mean cosine of all pairs of "rows".

    Raises:
        PeftGraphError: they have different numbers of features.
    """
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1]:
        raise PeftGraphError(f"Prompts of {_sizes(a)} and {_sizes(b)} cannot be compared.")
    a, b = (x.detach().double() for x in (a, b))
    if by == "mean":
        return float(cosine_similarity(a.mean(0), b.mean(0), dim=0))
    return float(cosine_similarity(a.unsqueeze(1), b.unsqueeze(0), dim=-1).mean())


def nearest(
    target: Tensor, sources: Mapping[str, Tensor], count: int = 1, by: Comparison = "mean"
) -> list[tuple[str, float]]:
    """Return the source tasks whose prompts are most similar to a target's, with the similarities, the nearest first.

    Args:
        target: (M, D).
        sources: (L, D) by the name of the task.
        count: how many to return.
        by: as for `similarity`.

    Raises:
        PeftGraphError: there are fewer sources, or one has another number of features.
    """
    if not 1 <= count <= len(sources):
        raise PeftGraphError(f"count must be between 1 and the {len(sources)} sources, got {count}.")
    found = [(name, similarity(target, prompt, by)) for name, prompt in sources.items()]
    return sorted(found, key=lambda one: -one[1])[:count]


def blend(target: Tensor, sources: Mapping[str, Tensor], count: int, by: Comparison = "mean") -> Tensor:
    """Return the mean of the nearest prompts (L, D), weighted by their similarities; arguments as for `nearest`.

    Raises:
        PeftGraphError: as `nearest`; or the similarity of a chosen source is not positive; or the lengths differ.
    """
    chosen = nearest(target, sources, count, by)
    if chosen[-1][1] <= 0:
        name, value = chosen[-1]
        raise PeftGraphError(f"The prompt of {name!r} has similarity {value:.3f}: choose a smaller count.")
    shapes = {tuple(sources[name].shape) for name, _ in chosen}
    if len(shapes) > 1:
        raise PeftGraphError(f"Prompts of different shapes have no mean: {sorted(shapes)}.")
    total = sum(value for _, value in chosen)
    return torch.stack([sources[name].detach() * (value / total) for name, value in chosen]).sum(0)


def _prompts(program: ProgramData) -> dict[str, Tensor]:
    """Return the rows of all prompts of a program, by full name."""
    stored = {name: entry.tensor.detach() for name, entry in program.table.items() if entry.added}
    found = stored | derived_values(program)
    return {name: value for name, value in found.items() if name.rpartition(".")[2] == LEAF}


def _only(program: ProgramData, name: str) -> str:
    """Return the full name of a program's only prompt, or of the prompt of a named pass.

    Raises:
        PeftGraphError: there is none, or there are several.
    """
    found = [path for path in _prompts(program) if not name or path.split(".")[-2] == name]
    if not found:
        raise PeftGraphError(
            f"No pass called {name!r} has a prompt." if name else "No pass of this program has a prompt."
        )
    if len(found) > 1:
        raise PeftGraphError(f"Several passes have a prompt: {', '.join(found)}. Choose one by its name: name=...")
    return found[0]


def _sizes(x: Tensor) -> str:
    return " x ".join(map(str, x.shape))
