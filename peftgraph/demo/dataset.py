"""Builds the quickstart's data set: clean sentences of documentation, labelled by family and split without leaks."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from peftgraph.demo.docstrings import docstrings, modules_of, rejection, sentences_in
from peftgraph.demo.families import FAMILIES
from peftgraph.demo.splits import Sentence, sample_groups, split, without_copies


@dataclass(frozen=True)
class Dataset:
    """Sentences in three parts, and what was left out.

    Attributes:
        families: the classes, in order; a label is an index into them.
        parts: part -> its sentences.
        dropped: reason -> number of sentences left out for it.
    """

    families: tuple[str, ...]
    parts: Mapping[str, tuple[Sentence, ...]]
    dropped: Mapping[str, int]

    def texts(self, part: str) -> list[str]:
        """Return the sentences of a part."""
        return [sentence.text for sentence in self.parts[part]]

    def labels(self, part: str) -> list[int]:
        """Return the family of each sentence of a part, as an index into `families`."""
        return [self.families.index(sentence.family) for sentence in self.parts[part]]


def build_dataset(seed: int, per_module: int = 40, per_family: int = 500) -> Dataset:
    """Build the data set from the running Python's standard library.

    Args:
        seed: decides which sentences are kept where there are too many, and the split.
        per_module: the most sentences of one module, so that no module makes up a family.
        per_family: the most sentences of one family, so that no family dominates.
    """
    dropped: Counter[str] = Counter()
    sentences = [sentence for family in FAMILIES for sentence in family_sentences(family, dropped)]
    sentences = without_copies(sentences, dropped)
    rng = random.Random(seed)
    sentences = sample_groups(sentences, lambda s: s.module, per_module, rng, dropped, "beyond the limit of a module")
    sentences = sample_groups(sentences, lambda s: s.family, per_family, rng, dropped, "beyond the limit of a family")
    return Dataset(tuple(FAMILIES), split(sentences, rng), dict(dropped))


def family_sentences(family: str, dropped: Counter[str]) -> list[Sentence]:
    """Return the clean sentences of one family, and count the others in `dropped` by reason."""
    found: list[Sentence] = []
    for module in modules_of(family):
        for docstring in docstrings(module):
            for text in sentences_in(docstring):
                reason = rejection(text, module)
                if reason is None:
                    found.append(Sentence(text, module, family))
                else:
                    dropped[reason] += 1
    return found
