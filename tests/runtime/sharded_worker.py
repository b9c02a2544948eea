"""One of several processes whose module is sharded: ten steps, and half of them resumed on one, end where one ends.

Arguments: a folder, and the cases, or none for all of them.
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import zoo
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.fsdp import fully_shard

import peftgraph as pg
from peftgraph.authoring import Pass
from peftgraph.passes import IA3, DoRA, Houlsby, LadderSide, LoRA, Prefix, Prompt, TrainableTokens
from peftgraph.runtime.block_module import BlockModule

F64 = torch.float64
STEPS = 10
ALL = "attention.*|ffn.*"
CASES: dict[str, tuple[str, tuple[Pass, ...]]] = {
    "tied head": ("llama", (LoRA(at=f"{ALL}|embedding", rank=2),)),
    "prefix": ("llama", (Prefix(length=3, hidden=5),)),
    "prompt": ("llama", (Prompt(length=3),)),
    "shared blocks": ("albert", (LoRA(at=ALL, rank=2),)),
    "experts": ("mixtral", (LoRA(at=ALL, rank=2),)),
    "read by all blocks": ("t5", (LoRA(at=ALL, rank=2),)),
    "side network": ("t5", (LadderSide(reduction=2),)),
    "adapters": ("gpt2", (Houlsby(width=3), LoRA(rank=2))),
    "scales": ("bert", (DoRA(at=ALL, rank=2), IA3())),
    "tokens": ("bert", (TrainableTokens(tokens=(3, 5)),)),
}


def albert() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.AlbertConfig(**zoo.SIZES | {"embedding_size": 12, "num_hidden_layers": 3})
    model: nn.Module = transformers.AlbertModel(config)
    return model.to(F64).eval()


@cache
def base(name: str) -> pg.Program:
    if name != "albert":
        return zoo.traced(name, dtype=F64)
    return pg.trace(albert(), zoo.example("bert", 3, 7, F64), verify="off")


def inputs(name: str) -> dict[str, Tensor]:
    torch.manual_seed(5)
    return zoo.example("bert" if name == "albert" else name, 4, 7, F64)


def tuned(case: str) -> pg.Program:
    name, passes = CASES[case]
    program = base(name)
    torch.manual_seed(1)
    return zoo.randomise(program.apply(*passes))


def sharded(net: Any) -> Any:
    """Each block, the embeddings together with the head that they may be tied to, and the rest."""
    for module in net.modules():
        if isinstance(module, BlockModule):
            fully_shard(module)
    head, table = net.get_output_embeddings(), net.get_input_embeddings()
    if head is not None and not hasattr(net, "shared"):  # T5's table is that of both stacks too: it stays the root's
        fully_shard([table, head], reshard_after_forward=False)
    return fully_shard(net)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor], steps: int) -> None:
    for _ in range(steps):
        output = zoo.leaves(net(**batch))[0]
        (output * torch.arange(output.shape[-1], dtype=F64).cos()).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def adam(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)


def state(net: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    model, moments = get_state_dict(net, optimizer, options=StateDictOptions(ignore_frozen_params=True))
    return {"model": model, "optimizer": moments}


def check(case: str, folder: Path) -> None:
    rank, count = dist.get_rank(), dist.get_world_size()
    batch = inputs(CASES[case][0])
    mine = {name: value.chunk(count)[rank] for name, value in batch.items()}
    program = tuned(case)
    net = sharded(program.module().eval())
    optimizer = adam(net)
    train(net, optimizer, mine, STEPS // 2)
    save(state(net, optimizer), checkpoint_id=folder / case)
    train(net, optimizer, mine, STEPS - STEPS // 2)
    with pytest.raises(pg.PeftGraphError, match=r"train as shards.* Call tuned\.gather\(net\) first"):
        pg.fold(program)
    program.gather(net)
    alone = tuned(case)
    train(plain := alone.module().eval(), adam(plain), batch, STEPS)
    agree(case, program, alone)
    if rank == 0:
        agree(case, resumed(case, folder / case, batch), alone)
    dist.barrier()


def resumed(case: str, folder: Path, batch: dict[str, Tensor]) -> pg.Program:
    """The program after the second half of the steps, on one process, from what several wrote."""
    program = tuned(case)
    net = program.module().eval()
    optimizer = adam(net)
    saved = state(net, optimizer)
    load(saved, checkpoint_id=folder, no_dist=True)
    options = StateDictOptions(strict=False)
    set_state_dict(
        net, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"], options=options
    )
    train(net, optimizer, batch, STEPS - STEPS // 2)
    return program


def agree(case: str, found: pg.Program, wanted: pg.Program) -> None:
    start = tuned(case).table.trainable
    assert any(not torch.equal(value, start[name]) for name, value in wanted.table.trainable.items())
    for name, value in wanted.table.trainable.items():
        torch.testing.assert_close(
            found.table.trainable[name], value, rtol=1e-9, atol=1e-10, msg=f"{case}: {name} differs"
        )


def main(folder: Path, *cases: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for case in cases or CASES:
        check(case, folder)
    if dist.get_rank() == 0:
        (folder / "agreed").touch()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
