"""Hand-written models and those of torch.nn, diffusers and timm: nothing is missed beyond what is known."""

from __future__ import annotations

from .known import complaints
from .score import Row

GROUPS = ("hand-written", "library")


def test_sites(row: Row) -> None:
    assert not complaints(row)
