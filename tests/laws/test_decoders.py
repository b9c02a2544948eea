"""The laws on decoders, in float64 on non-square models with randomised parameters."""

from __future__ import annotations

import laws
import pytest

NAMES = ("gpt2", "llama", "falcon", "gpt_neox", "gemma2", "mixtral", "nano")


@pytest.mark.parametrize(("name", "line"), laws.cases(*NAMES))
def test_every_law(name: str, line: str) -> None:
    laws.hold(name, line)
