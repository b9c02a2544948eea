"""The quickstart's data: clean, without leaks between its parts, and with one slip in each sentence."""

from __future__ import annotations

import random
from collections import Counter
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftgraph.demo import dataset
from peftgraph.demo.dataset import Dataset, build_dataset
from peftgraph.demo.docstrings import rejection
from peftgraph.demo.slips import KINDS, WRONG, make_slip
from peftgraph.demo.splits import NEAR, PARTS, Sentence, shingles, split, without_copies

MODULES = ("argparse", "bz2", "calendar", "decimal", "email", "inspect", "json", "logging", "pathlib", "queue", "zlib")


@pytest.fixture(autouse=True, scope="module")
def _read_once() -> object:
    """A few modules of the library are read once; every data set below is another draw and split of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset, "library_modules", lambda: list(MODULES))
        dropped: Counter[str] = Counter()
        library = dataset.library_sentences(dropped)
        patch.setattr(dataset, "library_sentences", lambda counts: counts.update(dropped) or library)
        yield


@cache
def drawn(seed: int) -> Dataset:
    return build_dataset(seed, dict.fromkeys(PARTS, 60), per_module=40)


@settings(max_examples=4, deadline=None)
@given(st.integers(0, 99))
def test_no_module_stands_in_two_parts(seed: int) -> None:
    modules = [{exercise.sentence.module for exercise in drawn(seed).parts[part]} for part in PARTS]
    assert not modules[0] & modules[1] | modules[0] & modules[2] | modules[1] & modules[2]


@settings(max_examples=4, deadline=None)
@given(st.integers(0, 99))
def test_no_sentence_of_a_part_is_a_near_copy_of_one_in_another(seed: int) -> None:
    sets = {part: [shingles(exercise.sentence.text) for exercise in drawn(seed).parts[part]] for part in PARTS}
    for a, b in (("train", "validation"), ("train", "test"), ("validation", "test")):
        for x in sets[a]:
            assert all(len(x & y) < NEAR * len(x | y) for y in sets[b])


def test_the_seed_decides_everything() -> None:
    again = build_dataset(5, dict.fromkeys(PARTS, 60), per_module=40)
    assert again == drawn(5)
    assert again.parts != drawn(6).parts


def test_every_part_is_within_its_limit_and_has_every_kind() -> None:
    for part in PARTS:
        assert 20 < len(drawn(0).parts[part]) <= 60
        assert {exercise.slip.kind for exercise in drawn(0).parts[part]} == set(KINDS)


def test_what_was_dropped_is_counted() -> None:
    assert {"a near copy of another", "beyond the limit of a module", "shorter than 9 words"} <= set(drawn(0).dropped)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(range(20)))
def test_a_slip_can_be_put_right(seed: int, row: int) -> None:
    text = drawn(0).parts["train"][row].sentence.text
    slip = make_slip(text, random.Random(seed))
    assert slip is not None
    width = 1 if slip.kind != "two words are swapped" else 2
    right = [*slip.words[: slip.place], slip.meant, *slip.words[slip.place + width :]]
    assert " ".join(right) == text
    assert " ".join(slip.words) != text
    assert slip.place > 0, "the capital would give the slip away"


@pytest.mark.parametrize(
    ("text", "kind", "slipped"),
    [
        ("Take the Ford.", "a word is missing", "Take Ford."),
        ("Take blue paint now.", "two words are swapped", "Take paint blue now."),
        ("Take then Ford.", "a wrong word", "Take than Ford."),
    ],
)
def test_each_kind(text: str, kind: str, slipped: str) -> None:
    slip = make_slip(text, random.Random(0))
    assert slip is not None
    assert (slip.kind, " ".join(slip.words), slip.place) == (kind, slipped, 1)


def test_a_sentence_without_a_place_for_a_slip_gets_none() -> None:
    assert make_slip("The Ford, Ford the.", random.Random(0)) is None


def test_pairs_go_both_ways() -> None:
    assert all(WRONG[WRONG[word]] == word for word in WRONG)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Send all of the data to the remote end of this connection.", None),
        ("Return it.", "shorter"),
        ("Send " + "more " * 25 + "data.", "longer"),
        ("send all of the data to the remote end of this connection.", "no whole sentence"),
        ("Send all of the data to the remote end of this connection", "no whole sentence"),
        ("Call send(data, flags) for all of the data until nothing is left.", "a signature"),
    ],
)
def test_the_filter(text: str, reason: str | None) -> None:
    found = rejection(text)
    assert found is None if reason is None else found is not None and found.startswith(reason)


def test_of_copies_the_first_is_kept() -> None:
    text = "Return the number of bytes that were written to the file."
    copy = text.replace("file", "FILE, really")
    other = "Close the connection and wait for all of the pending work."
    dropped: Counter[str] = Counter()
    kept = without_copies([Sentence(text, "m"), Sentence(copy, "n"), Sentence(other, "m")], dropped)
    assert [sentence.text for sentence in kept] == [text, other]
    assert dropped == {"a near copy of another": 1}


def test_whole_modules_go_to_the_part_that_lacks_the_most() -> None:
    sizes = {"a": 60, "b": 25, "c": 10, "d": 5}
    sentences = [Sentence(str(i), module) for module, size in sizes.items() for i in range(size)]
    parts = split(sentences, random.Random(0))
    assert {part: len(chosen) for part, chosen in parts.items()} == {"train": 60, "validation": 15, "test": 25}
