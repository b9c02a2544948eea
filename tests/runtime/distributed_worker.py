"""One of several processes under DistributedDataParallel: each has its part of a batch, and checkpoints its blocks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import zoo
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

import peftgraph as pg
from peftgraph.passes import LoRA


def gradients(net: torch.nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    output: Any = net(idx=ids)
    output["logits"].square().mean().backward()
    return {name.removeprefix("module."): p.grad for name, p in net.named_parameters() if p.grad is not None}


def program() -> pg.Program:
    torch.manual_seed(0)
    model = zoo.Nano().double()
    for block in model.stack:
        block.drop.p = 0.0  # processes draw apart
    traced = pg.trace(model, zoo.example("nano"))
    torch.manual_seed(1)
    return zoo.randomise(traced.apply(LoRA(rank=2)))


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, count = dist.get_rank(), dist.get_world_size()
    ids = torch.randint(0, zoo.VOCAB, (4, 7), generator=torch.Generator().manual_seed(2))
    wanted = gradients(program().module(), ids)
    net: Any = program().module()
    net.gradient_checkpointing_enable()
    found = gradients(DistributedDataParallel(net), ids.chunk(count)[rank])
    assert found.keys() == wanted.keys()
    assert found
    for name, grad in found.items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-12, atol=1e-14)
    dist.barrier()
    if rank == 0:
        (folder / "agreed").touch()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
