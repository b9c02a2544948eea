"""What each pass does to a small model is what its golden text says."""

from __future__ import annotations

import golden_texts
import pytest

from peftgraph import passes
from peftgraph.authoring import Pass


@pytest.mark.parametrize("method", golden_texts.METHODS, ids=lambda method: method.word)
def test_the_text_is_the_golden_one(method: Pass) -> None:
    path = golden_texts.FOLDER / f"{method.word}.txt"
    assert golden_texts.text(method) == path.read_text(encoding="utf-8"), "run tests/support/golden_texts.py, and read"


def test_every_pass_has_one() -> None:
    known = {one.word for one in vars(passes).values() if isinstance(one, type) and issubclass(one, Pass)}
    assert {path.stem for path in golden_texts.FOLDER.iterdir()} == known
