"""The laws on encoders with decoders, in float64 on non-square models with randomised parameters."""

from __future__ import annotations

import laws
import pytest


@pytest.mark.parametrize(("name", "line"), laws.cases("t5", "bart", "whisper"))
def test_every_law(name: str, line: str) -> None:
    laws.hold(name, line)
