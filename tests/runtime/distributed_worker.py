"""One of several processes under DistributedDataParallel: each has its part of a batch, and checkpoints its blocks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import zoo
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import peftgraph as pg
from peftgraph.authoring.training import full
from peftgraph.passes import AdaLoRA, LoRA
from peftgraph.runtime.training_region import Optimise

STEPS = 6


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


def learned(wrap: Callable[[Any], Any], ids: torch.Tensor, optimise: Optimise) -> dict[str, torch.Tensor]:
    """The parameters that AdaLoRA ends at, each of them whole."""
    torch.manual_seed(1)
    tuned = program().remove().apply(AdaLoRA(at="attention.*", rank=4, target_rank=2, warmup=1, orthogonality=0.3))
    module = tuned.module(optimise)
    net = wrap(module)
    run = tuned.training(net, steps=STEPS)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.5)
    for _ in range(STEPS):
        output: Any = net(idx=ids)
        (output["logits"].square().mean() + run.penalty()).backward()
        optimizer.step()
        run.step()
        optimizer.zero_grad()
    report = tuned.explain_cost(module)
    assert bool(report.costs) == (optimise == "train"), report
    assert not report.refusals, report
    trained = ((name.removeprefix("module."), p) for name, p in net.named_parameters() if p.requires_grad)
    return {name: full(p).detach() for name, p in trained}


def sharded(net: Any) -> Any:
    for block in net.stack:
        fully_shard(block)
    return fully_shard(net)


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
    alone = learned(lambda net: net, ids, "off")
    assert sum(int((value == 0).sum()) for name, value in alone.items() if name.endswith("_e")) == 2 * 4 * 2
    for wrap in (DistributedDataParallel, sharded):
        for name, value in learned(wrap, ids.chunk(count)[rank], "train").items():
            torch.testing.assert_close(value, alone[name], rtol=1e-9, atol=1e-12)
    dist.barrier()
    if rank == 0:
        (folder / "agreed").touch()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
