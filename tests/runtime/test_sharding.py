"""Modules whose parameters are sharded over processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import zoo
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard

import peftgraph as pg
from peftgraph.passes import LoRA

CASES = (
    "tied head", "prefix", "prompt", "shared blocks", "experts", "read by all blocks", "side network", "adapters",
    "scales", "tokens",
)  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_ten_steps_and_a_resumed_half_end_where_one_process_ends(case: str, tmp_path: Path) -> None:
    worker = Path(__file__).with_name("sharded_worker.py")
    options = ["--standalone", "--nproc-per-node=2", str(worker), str(tmp_path), case]
    command = [sys.executable, "-m", "torch.distributed.run", *options]
    paths = {"PYTHONPATH": str(Path(zoo.__file__).parent)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | paths)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "agreed").exists()


@pytest.fixture
def alone(tmp_path: Path):
    """A group of one process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_a_part_of_a_block_is_refused_and_values_are_read_back() -> None:
    tuned = zoo.traced("nano", dtype=torch.float64).apply(LoRA(rank=2))
    inputs = zoo.example("nano")
    net = tuned.module()
    fully_shard(net.get_submodule("stack.1.fc"))
    fully_shard(net)
    with pytest.raises(pg.PeftGraphError, match=r"stack\.1\.fc is sharded by itself, and its block stack\.1 runs"):
        net(**inputs)
    net = tuned.module()
    fully_shard(net)
    net(**inputs)["logits"].square().mean().backward()
    name, parameter = next((name, p) for name, p in net.named_parameters() if name.endswith("lora_B"))
    with torch.no_grad():
        parameter.add_(1.0)
    for act in (pg.fold, pg.Program.module, lambda program: program.save_adapter("nowhere")):
        with pytest.raises(pg.PeftGraphError, match=r"train as shards.* Call tuned\.gather\(net\) first"):
            act(tuned)
    assert not tuned.table.trainable[name].any()
    assert bool((tuned.gather(net).table.trainable[name] == 1).all())
    pg.fold(tuned)
    other = zoo.traced("nano", dtype=torch.float64).apply(LoRA(at="ffn.*", rank=2))
    with pytest.raises(pg.PeftGraphError, match="it was made of another program"):
        other.gather(net)


def test_a_module_names_its_embeddings_and_its_blocks_as_the_model_does() -> None:
    net = zoo.traced("gpt2").module()
    assert net.get_input_embeddings() is net.get_submodule("transformer.wte")
    assert net.get_output_embeddings() is net.get_submodule("lm_head")
    assert {type(block).__name__ for block in net.get_submodule("transformer.h")} == {"GPT2Block"}
    assert len({type(block) for block in net.get_submodule("transformer.h")}) == 1
