"""Folding weights chunk by chunk gives what whole weights give, whatever the chunks and whoever owns their rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import sharded
import torch
import zoo

import peftgraph as pg
from peftgraph.folding import chunks, steps
from peftgraph.folding.chunks import Chunk, chunks_of
from peftgraph.interop.checkpoints.shard_writer import write_shards
from peftgraph.rewrite.weight_views import View
from peftgraph.sites import Columns

RECIPES = {
    "llama": "lora{rank=2 at=attention.*|ffn.*}; ia3{}",
    "gpt2": "dora{rank=2 at=attention.*|ffn.*}; ia3{at=attention.q}",  # fused and transposed, with biases
    "gpt_neox": "lora{rank=2 at=attention.*}; ia3{}",  # rows of a head side by side
    "mixtral": 'lora{rank=2 at=attention.*|ffn.* init="pissa"}; ia3{side=input at=attention.o}',  # stacks of experts
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of three rows."""
    monkeypatch.setattr(chunks, "VALUES", 1)
    monkeypatch.setattr(chunks, "FEWEST", 3)


def tuned_of(name: str, dtype: torch.dtype) -> pg.Program:
    return zoo.randomise(zoo.traced(name, dtype=dtype).apply(pg.load_recipe(RECIPES[name])))


@pytest.mark.parametrize("name", RECIPES)
def test_chunks_fold_to_what_the_whole_folds_to(name: str, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned = tuned_of(name, torch.float64)
    by_chunk = pg.fold(tuned)
    monkeypatch.setattr(steps.WriteWindows, "chunks", lambda self, table: [])
    whole = pg.fold(tuned)
    assert by_chunk.proof is not None
    assert whole.proof is not None
    assert by_chunk.proof.changed == whole.proof.changed
    for key, entry in whole.table.items():
        torch.testing.assert_close(by_chunk.table[key].tensor, entry.tensor, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_shards_and_write_back_cut_at_the_same_rows(name: str, small: None, tmp_path: Path) -> None:
    folder = sharded.saved(name, tmp_path / "model", torch.bfloat16)
    tuned = tuned_of(name, torch.bfloat16)
    checkpoint, updates = sharded.own_updates(folder, tuned.save_adapter(tmp_path / "adapter"))
    write_shards(checkpoint, updates, tmp_path / "out", sharded.silent)
    pg.fold(tuned).write_back(zoo.build(name, dtype=torch.bfloat16)).save_pretrained(tmp_path / "whole")  # pyright: ignore
    assert sharded.differing(sharded.contents(tmp_path / "out"), sharded.contents(tmp_path / "whole")) == []


def test_no_chunk_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product with one row takes another routine, which rounds otherwise."""
    monkeypatch.setattr(chunks, "VALUES", 40)
    monkeypatch.setattr(chunks, "FEWEST", 4)
    view = View("w")
    assert chunks_of(torch.empty(3, 10), view) == [Chunk(0, 3)]
    assert chunks_of(torch.empty(9, 10), view) == [Chunk(0, 4), Chunk(4, 9)]
    assert chunks_of(torch.empty(10, 9), View("w", transposed=True)) == [Chunk(0, 4), Chunk(4, 9)]
    assert chunks_of(torch.empty(2, 9, 10), View("w", experts=2))[2:] == [Chunk(0, 4, 1), Chunk(4, 9, 1)]


def test_a_chunk_takes_a_sites_own_rows_in_their_order() -> None:
    chunk, window = Chunk(4, 8), Columns(((6, 10), (0, 5)))  # of nine: 6 and 7 stand first, 4 last
    value = torch.arange(9)
    assert chunk.slice_parameter(value, -1, window).tolist() == [0, 1, 8]
    assert chunk.slice_parameter(value[4:8], None, window).tolist() == [4, 5, 6, 7]
    assert chunk._window(window) == Columns(((2, 4), (0, 1)))
    assert chunk._window(Columns(((0, 4), (8, 9)))) == Columns(())
    assert chunk._window(Columns(((0, 9),))) is None
