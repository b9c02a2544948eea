"""The audio models, multimodal models and their towers of the zoo: nothing is missed beyond what is known."""

from __future__ import annotations

from .known import complaints
from .score import Row

GROUPS = ("audio", "multimodal")


def test_sites(row: Row) -> None:
    assert not complaints(row)
