"""The encoders and encoder-decoders of the zoo: nothing is missed beyond what is known."""

from __future__ import annotations

from .known import complaints
from .score import Row

GROUPS = ("encoder", "encoder-decoder")


def test_sites(row: Row) -> None:
    assert not complaints(row)
