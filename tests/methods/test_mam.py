"""The mix-and-match adapter is its two parts, one after the other."""

from __future__ import annotations

import pytest
import torch
import zoo

import peftgraph as pg
from peftgraph.passes import MAM, ParallelAdapter, Prefix

F64 = torch.float64


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_it_is_a_prefix_and_a_parallel_adapter(name: str, tmp_path) -> None:
    base = zoo.traced(name, "sdpa", F64)
    mixed = base.apply(MAM(length=3, hidden=5, width=4, scale=2.0))
    parts = base.apply(Prefix(length=3, hidden=5), ParallelAdapter(width=4, scale=2.0))
    assert mixed.text() == parts.text()
    assert [applied.method for applied in mixed.history] == [applied.method for applied in parts.history]
    zoo.randomise(mixed)
    loaded = base.load_adapter(mixed.save_adapter(tmp_path / "mam"))
    assert loaded.table.hashes() == mixed.table.hashes()
    assert mixed.finalize().text() == base.apply(MAM(length=3, hidden=None, width=4, scale=2.0)).text()


def test_specs_round_trip_and_names_are_kept_apart() -> None:
    method = MAM(length=3, hidden=None, width=4, input="residual", name="mine")
    assert pg.parse_pass(str(method)) == method
    assert [part.name for part in method.passes()] == ["mine", "mine"]


def test_options_are_checked() -> None:
    with pytest.raises(pg.RecipeError, match="width must be at least 1"):
        MAM(width=0)
    with pytest.raises(pg.RecipeError, match="length must be at least 1"):
        MAM(length=0)
