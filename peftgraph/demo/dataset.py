"""Builds the quickstart's data set: clean sentences of documentation, split without leaks, with one slip in each."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from peftgraph.demo.docstrings import docstrings, library_modules, rejection, sentences_in
from peftgraph.demo.slips import Slip, make_slip
from peftgraph.demo.splits import Sentence, sample_modules, split, without_copies


@dataclass(frozen=True)
class Exercise:
    """A sentence, and the same with a slip."""

    sentence: Sentence
    slip: Slip


@dataclass(frozen=True)
class Dataset:
    """Exercises in three parts, and what was left out.

    Attributes:
        parts: part -> its exercises.
        dropped: reason -> number of sentences left out for it.
    """

    parts: Mapping[str, tuple[Exercise, ...]]
    dropped: Mapping[str, int]


def build_dataset(seed: int, limits: Mapping[str, int], per_module: int = 250) -> Dataset:
    """Build the data set from the running Python's standard library.

    Args:
        seed: decides which sentences are kept where there are too many, the split, and the slips.
        limits: the most sentences of each part.
        per_module: the most sentences of one module, so that none dominates.
    """
    dropped: Counter[str] = Counter()
    sentences = without_copies(library_sentences(dropped), dropped)
    rng = random.Random(seed)
    parts: dict[str, tuple[Exercise, ...]] = {}
    for part, chosen in split(sample_modules(sentences, per_module, rng, dropped), rng).items():
        drawn = [(sentence, make_slip(sentence.text, rng)) for sentence in chosen]
        exercises = [Exercise(sentence, slip) for sentence, slip in drawn if slip is not None]
        dropped["no slip is possible"] += len(chosen) - len(exercises)
        dropped["beyond the limit of a part"] += max(0, len(exercises) - limits[part])
        parts[part] = tuple(exercises[: limits[part]])
    return Dataset(parts, {reason: count for reason, count in dropped.items() if count})


def library_sentences(dropped: Counter[str]) -> list[Sentence]:
    """Return the clean sentences of the standard library, and count the others in `dropped` by reason."""
    found: list[Sentence] = []
    for module in library_modules():
        for docstring in docstrings(module):
            for text in sentences_in(docstring):
                reason = rejection(text)
                if reason is None:
                    found.append(Sentence(text, module))
                else:
                    dropped[reason] += 1
    return found
