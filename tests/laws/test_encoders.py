"""The laws on encoders of text and of pictures, in float64 on non-square models with randomised parameters."""

from __future__ import annotations

import laws
import pytest

NAMES = ("bert", "minilm", "roberta", "deberta", "vit", "clip_text", "clip_vision")


@pytest.mark.parametrize(("name", "line"), laws.cases(*NAMES))
def test_every_law(name: str, line: str) -> None:
    laws.hold(name, line)
