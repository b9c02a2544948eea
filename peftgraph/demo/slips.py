"""Puts one slip into a sentence: a word missing, two neighbours swapped, or a wrong word of a pair that is mixed up."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

FUNCTION_WORDS = frozenset(
    (*("a", "an", "the", "of", "to", "in", "on", "at", "by", "for", "from", "with", "as", "into", "and", "or", "that"),
     *("is", "are", "was", "were", "be", "been", "has", "have", "if", "it", "this", "not"))
)  # fmt: skip
PAIRS = (
    "its it's", "then than", "a an", "is are", "was were", "has have", "does do", "this these", "that those",
    "their there", "to too", "of off", "your you're", "whose who's", "lose loose", "affect effect", "by buy",
)  # fmt: skip
WRONG: Mapping[str, str] = {
    word: other for pair in PAIRS for word, other in (tuple(pair.split()), tuple(reversed(pair.split())))
}


@dataclass(frozen=True)
class Slip:
    """A sentence with one slip.

    Attributes:
        words: of the sentence, with the slip.
        place: the index of the word to point at: the word behind a gap, the first of two that were swapped, or the
            wrong one.
        kind: of the slip, a key of `KINDS`.
        meant: what stands in the right sentence there.
    """

    words: tuple[str, ...]
    place: int
    kind: str
    meant: str


def make_slip(text: str, rng: random.Random) -> Slip | None:
    """Put one slip into a sentence: of a random kind among those possible, at a random place of that kind.

    The first and the last word are left alone, since their capital and full stop would give a slip away.

    Args:
        text: the sentence.
        rng: decides.

    Returns:
        None where no kind is possible.
    """
    words = text.split()
    places = {kind: [i for i in range(1, len(words) - 1) if can(words, i)] for kind, (can, _) in KINDS.items()}
    possible = [kind for kind, found in places.items() if found]
    if not possible:
        return None
    kind = rng.choice(possible)
    place = rng.choice(places[kind])
    slipped, meant = KINDS[kind][1](words, place)
    return Slip(tuple(slipped), place, kind, meant)


def _is_plain(word: str) -> bool:
    return re.fullmatch(r"[a-z][a-z'-]*", word) is not None


def _can_swap(words: Sequence[str], i: int) -> bool:
    return i + 2 < len(words) and _is_plain(words[i]) and _is_plain(words[i + 1]) and words[i] != words[i + 1]


def _without(words: Sequence[str], i: int) -> tuple[Iterable[str], str]:
    return [*words[:i], *words[i + 1 :]], f"{words[i]} {words[i + 1]}"


def _swapped(words: Sequence[str], i: int) -> tuple[Iterable[str], str]:
    return [*words[:i], words[i + 1], words[i], *words[i + 2 :]], f"{words[i]} {words[i + 1]}"


def _mixed_up(words: Sequence[str], i: int) -> tuple[Iterable[str], str]:
    return [*words[:i], WRONG[words[i]], *words[i + 1 :]], words[i]


Can = Callable[[Sequence[str], int], bool]
Make = Callable[[Sequence[str], int], tuple[Iterable[str], str]]

# Kind -> whether it is possible at a word, and how it is made there.
KINDS: Mapping[str, tuple[Can, Make]] = {
    "a word is missing": (lambda words, i: words[i] in FUNCTION_WORDS, _without),
    "two words are swapped": (_can_swap, _swapped),
    "a wrong word": (lambda words, i: words[i] in WRONG, _mixed_up),
}
