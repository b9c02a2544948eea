"""The quickstart's data: clean, and without leaks between its parts."""

from __future__ import annotations

from collections import Counter
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftgraph.demo import dataset
from peftgraph.demo.dataset import Dataset, build_dataset
from peftgraph.demo.docstrings import module_words, rejection
from peftgraph.demo.families import FAMILIES
from peftgraph.demo.splits import NEAR, PARTS, Sentence, shingles, without_copies


@pytest.fixture(autouse=True, scope="module")
def _read_once() -> object:
    """The library is read once; every data set below is another draw and split of it."""
    dropped: Counter[str] = Counter()
    library = {family: dataset.family_sentences(family, dropped) for family in FAMILIES}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset, "family_sentences", lambda family, _: library[family])
        yield


@cache
def drawn(seed: int) -> Dataset:
    return build_dataset(seed, per_module=8, per_family=60)


@settings(max_examples=4, deadline=None)
@given(st.integers(0, 99))
def test_no_module_stands_in_two_parts(seed: int) -> None:
    modules = [{sentence.module for sentence in drawn(seed).parts[part]} for part in PARTS]
    assert not modules[0] & modules[1] | modules[0] & modules[2] | modules[1] & modules[2]


@settings(max_examples=4, deadline=None)
@given(st.integers(0, 99))
def test_no_sentence_of_a_part_is_a_near_copy_of_one_in_another(seed: int) -> None:
    sets = {part: [shingles(text) for text in drawn(seed).texts(part)] for part in PARTS}
    for a, b in (("train", "validation"), ("train", "test"), ("validation", "test")):
        for x in sets[a]:
            assert all(len(x & y) < NEAR * len(x | y) for y in sets[b])


@settings(max_examples=4, deadline=None)
@given(st.integers(0, 99))
def test_no_sentence_names_its_module(seed: int) -> None:
    for part in PARTS:
        for sentence in drawn(seed).parts[part]:
            words = set(sentence.text.lower().replace(".", " ").replace(",", " ").split())
            assert not words & {name.lower() for name in module_words(sentence.module)}, sentence


def test_the_seed_decides_everything() -> None:
    again = build_dataset(5, per_module=8, per_family=60)
    assert again == drawn(5)
    assert again.parts != drawn(6).parts


def test_families_are_balanced_and_in_every_part() -> None:
    for part in PARTS:
        sizes = Counter(sentence.family for sentence in drawn(0).parts[part])
        assert set(sizes) == set(FAMILIES)
        assert max(sizes.values()) <= 2 * min(sizes.values())


def test_what_was_dropped_is_counted() -> None:
    kept = sum(len(part) for part in drawn(0).parts.values())
    reasons = drawn(0).dropped
    assert kept + sum(reasons.values()) > kept
    assert {"a near copy of another", "beyond the limit of a module", "beyond the limit of a family"} <= set(reasons)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Send all of the data to the remote end of this connection.", None),
        ("Return it.", "shorter"),
        ("send all of the data to the remote end of this connection.", "no whole sentence"),
        ("Send all of the data to the remote end of this connection", "no whole sentence"),
        ("Call send(data, flags) for all of the data until nothing is left.", "a signature"),
        ("Send all of the data to the socket until nothing of it is left.", "names its own module"),
        ("Send all of the data to these sockets until nothing of it is left.", "names its own module"),
    ],
)
def test_the_filter(text: str, reason: str | None) -> None:
    found = rejection(text, "socket")
    assert found is None if reason is None else found is not None and found.startswith(reason)


def test_copies_across_families_go_altogether() -> None:
    text = "Return the number of bytes that were written to the file."
    copy = text.replace("file", "FILE, really")
    other = "Close the connection and wait for all of the pending work."
    kept = without_copies([Sentence(text, "m", "a"), Sentence(copy, "n", "b"), Sentence(other, "m", "a")], Counter())
    assert [sentence.text for sentence in kept] == [other]
    kept = without_copies([Sentence(text, "m", "a"), Sentence(copy, "n", "a")], Counter())
    assert [sentence.text for sentence in kept] == [text]
