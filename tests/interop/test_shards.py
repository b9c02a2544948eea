"""Merging shard by shard: the same bits as write_back, few tensors in memory, and what is refused before writing."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
import zoo
from torch import Tensor

import peftgraph as pg
from peftgraph.cli.models import load, skeleton, trace
from peftgraph.interop.shards.checkpoint import INDEX, Checkpoint
from peftgraph.interop.shards.folded import Folded, folded_updates
from peftgraph.interop.shards.write import write_shards

BF16, F32 = torch.bfloat16, torch.float32


def saved(name: str, folder: Path, dtype: torch.dtype = F32, size: str = "40KB") -> Path:
    """A small model in shards."""
    model = zoo.build(name).to(dtype)
    model.config.dtype = dtype  # pyright: ignore
    model.save_pretrained(folder, max_shard_size=size)  # pyright: ignore
    return folder


def contents(folder: Path) -> dict[str, Tensor]:
    """All stored tensors."""
    return {k: v for path in folder.glob("*.safetensors") for k, v in safetensors.torch.load_file(path).items()}


def own_updates(folder: Path, adapter: Path) -> tuple[Checkpoint, Folded]:
    """What an adapter of ours changes."""
    checkpoint = Checkpoint.open(folder)
    model = skeleton(folder, checkpoint.dtype)
    program = trace(model)
    prefix = model.base_model_prefix
    return checkpoint, folded_updates(program, program.sites, program.apply, adapter, checkpoint, prefix)


def silent(count: int) -> None:
    """No progress."""


CASES = {
    "bert": ("lora{rank=2}; ia3{}; bitfit{}", F32),
    "llama": ("lora{rank=2 at=attention.*|ffn.*}; ia3{}", BF16),  # its head is tied and stored once
    "gpt2": ("dora{rank=2 at=attention.*|ffn.*}; ia3{}", BF16),  # fused and transposed
    "t5": ('lora{rank=2 init="pissa"}; bitfit{at=norm norms=true}', F32),
    "roberta": ("freeze{at=embedding|layers(1)}; lora{rank=2 at=attention.*}", torch.float16),
    "mixtral": ("lora{rank=2}; ia3{at=attention.k}", F32),
}


@pytest.mark.parametrize("name", CASES)
def test_shards_hold_the_bits_of_write_back(name: str, tmp_path: Path) -> None:
    recipe, dtype = CASES[name]
    folder = saved(name, tmp_path / "model", dtype)
    model = load(folder)
    tuned = zoo.randomise(trace(model).apply(pg.load_recipe(recipe)))
    checkpoint, updates = own_updates(folder, tuned.save_adapter(tmp_path / "adapter"))
    out = tmp_path / "merged"
    assert len(checkpoint.files) > 2
    assert write_shards(checkpoint, updates, out, silent) == 0
    pg.fold(tuned).write_back(model).save_pretrained(tmp_path / "whole")
    expected, found, before = contents(tmp_path / "whole"), contents(out), contents(folder)
    assert found.keys() == expected.keys()
    assert [k for k in found if not torch.equal(found[k], expected[k]) or found[k].dtype != expected[k].dtype] == []
    assert {k for k in found if not torch.equal(found[k], before[k])} == updates.changed.keys()
    assert (out / INDEX).read_bytes() == (folder / INDEX).read_bytes()
    assert {p.name for p in out.iterdir()} == {p.name for p in folder.iterdir()} - {
        "config.json",
        "generation_config.json",
    }
