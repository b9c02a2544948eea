"""Splits sentences into training, validation and test parts that share no module and no near copy."""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

SHINGLE = 3
NEAR = 0.5  # the Jaccard similarity of word triples from which two sentences count as copies
PARTS = ("train", "validation", "test")
SHARES = (0.6, 0.15, 0.25)


@dataclass(frozen=True)
class Sentence:
    """One sentence of documentation, and the top-level module that contains it."""

    text: str
    module: str


def shingles(text: str) -> frozenset[tuple[str, ...]]:
    """Return a sentence's word triples in lower case; two sentences are near copies when most of them agree."""
    words = re.findall(r"[a-z]+", text.lower())
    return frozenset(tuple(words[i : i + SHINGLE]) for i in range(len(words) - SHINGLE + 1))


def without_copies(sentences: Sequence[Sentence], dropped: Counter[str]) -> list[Sentence]:
    """Return sentences of which no two are near copies, the first of each kind, and count the others in `dropped`."""
    kept: list[Sentence] = []
    known: list[frozenset[tuple[str, ...]]] = []
    index: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)
    for sentence in sentences:
        own = shingles(sentence.text)
        if _is_copy(own, known, index):
            dropped["a near copy of another"] += 1
            continue
        for shingle in own:
            index[shingle].append(len(kept))
        kept.append(sentence)
        known.append(own)
    return kept


def _is_copy(
    own: frozenset[tuple[str, ...]],
    known: Sequence[frozenset[tuple[str, ...]]],
    index: Mapping[tuple[str, ...], Sequence[int]],
) -> bool:
    shared = Counter(number for shingle in own for number in index.get(shingle, ()))
    return any(common >= NEAR * (len(own) + len(known[number]) - common) for number, common in shared.items())


def sample_modules(
    sentences: Sequence[Sentence], limit: int, rng: random.Random, dropped: Counter[str]
) -> list[Sentence]:
    """Return the sentences with at most `limit` of each module, drawn at random; count the others in `dropped`."""
    kept: list[Sentence] = []
    for group in _by_module(sentences):
        kept += rng.sample(group, limit) if len(group) > limit else group
        dropped["beyond the limit of a module"] += max(0, len(group) - limit)
    return kept


def split(sentences: Sequence[Sentence], rng: random.Random) -> dict[str, tuple[Sentence, ...]]:
    """Split the sentences into `PARTS`: whole modules, the largest first, go to the part that lacks the most."""
    parts: dict[str, list[Sentence]] = {part: [] for part in PARTS}
    for group in sorted(_by_module(sentences), key=lambda group: (-len(group), rng.random())):
        lacks = {part: share * len(sentences) - len(parts[part]) for part, share in zip(PARTS, SHARES, strict=True)}
        parts[max(PARTS, key=lacks.__getitem__)] += group
    for chosen in parts.values():
        rng.shuffle(chosen)
    return {part: tuple(chosen) for part, chosen in parts.items()}


def _by_module(sentences: Sequence[Sentence]) -> list[list[Sentence]]:
    groups: defaultdict[str, list[Sentence]] = defaultdict(list)
    for sentence in sentences:
        groups[sentence.module].append(sentence)
    return list(groups.values())
