"""Splits sentences into training, validation and test parts that share no module and no near copy."""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

SHINGLE = 3
NEAR = 0.5  # the Jaccard similarity of word triples from which two sentences count as copies
PARTS = ("train", "validation", "test")
SHARES = (0.55, 0.2, 0.25)


@dataclass(frozen=True)
class Sentence:
    """One sentence of documentation, the module that contains it, and that module's family."""

    text: str
    module: str
    family: str


def shingles(text: str) -> frozenset[tuple[str, ...]]:
    """Return a sentence's word triples in lower case; two sentences are near copies when most of them agree."""
    words = re.findall(r"[a-z]+", text.lower())
    return frozenset(tuple(words[i : i + SHINGLE]) for i in range(len(words) - SHINGLE + 1))


def without_copies(sentences: Sequence[Sentence], dropped: Counter[str]) -> list[Sentence]:
    """Return sentences of which no two are near copies, and count the others in `dropped`.

    Of copies within one family the first is kept. A sentence that occurs in two families identifies neither, so all its
    copies are dropped.
    """
    kept: dict[int, tuple[Sentence, frozenset[tuple[str, ...]]]] = {}
    ambiguous: set[int] = set()
    index: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)
    for number, sentence in enumerate(sentences):
        own = shingles(sentence.text)
        copies = _copies(own, kept, index)
        if not copies:
            kept[number] = (sentence, own)
            for shingle in own:
                index[shingle].append(number)
            continue
        dropped["a near copy of another"] += 1
        ambiguous |= {other for other in copies if kept[other][0].family != sentence.family}
    dropped["in two families"] += len(ambiguous)
    return [sentence for number, (sentence, _) in kept.items() if number not in ambiguous]


def _copies(
    own: frozenset[tuple[str, ...]],
    kept: Mapping[int, tuple[Sentence, frozenset[tuple[str, ...]]]],
    index: Mapping[tuple[str, ...], Sequence[int]],
) -> list[int]:
    shared = Counter(number for shingle in own for number in index.get(shingle, ()))
    return [number for number, common in shared.items() if common >= NEAR * (len(own) + len(kept[number][1]) - common)]


def sample_groups(
    sentences: Sequence[Sentence],
    key: Callable[[Sentence], str],
    limit: int,
    rng: random.Random,
    dropped: Counter[str],
    reason: str,
) -> list[Sentence]:
    """Return the sentences with at most `limit` of each group, drawn at random; count the others under `reason`."""
    groups: defaultdict[str, list[Sentence]] = defaultdict(list)
    for sentence in sentences:
        groups[key(sentence)].append(sentence)
    kept: list[Sentence] = []
    for group in groups.values():
        kept += rng.sample(group, limit) if len(group) > limit else group
        dropped[reason] += max(0, len(group) - limit)
    return kept


def split(sentences: Sequence[Sentence], rng: random.Random) -> dict[str, tuple[Sentence, ...]]:
    """Split the sentences into `PARTS`; in each family, whole modules go to the part that lacks the most."""
    parts: dict[str, list[Sentence]] = {part: [] for part in PARTS}
    for family in dict.fromkeys(sentence.family for sentence in sentences):
        groups: defaultdict[str, list[Sentence]] = defaultdict(list)
        for sentence in sentences:
            if sentence.family == family:
                groups[sentence.module].append(sentence)
        order = sorted(groups.values(), key=lambda group: (-len(group), rng.random()))
        total = sum(map(len, order))
        assigned = dict.fromkeys(PARTS, 0)
        for group in order:
            part = max(PARTS, key=lambda name: SHARES[PARTS.index(name)] * total - assigned[name])
            assigned[part] += len(group)
            parts[part] += group
    for chosen in parts.values():
        rng.shuffle(chosen)
    return {part: tuple(chosen) for part, chosen in parts.items()}
