"""AdaLoRA step by step beside peft's, its schedule, the LoRAs it becomes, and peft's directories both ways."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import zoo
from torch import Tensor, nn

import peftgraph as pg
from peftgraph.passes import AdaLoRA, LoRA

STEPS = 16
METHOD = AdaLoRA(at="ffn.*", rank=6, target_rank=3, alpha=12.0, warmup=2, final=4, interval=2)
LEAVES = {"adalora_Q": "lora_A", "adalora_e": "lora_E", "adalora_P": "lora_B"}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x + self.down(torch.relu(self.up(x)))))


class WithLoss(nn.Module):
    """What peft adds its term of the loss to."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.config = net, {}

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return SimpleNamespace(loss=(self.net(x) - y).square().mean())


@pytest.fixture
def base() -> tuple[nn.Module, pg.Program]:
    torch.manual_seed(0)
    net = Block().double().eval()
    return net, pg.trace(net, (torch.randn(2, 4, 8, dtype=torch.float64),))


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        yield tuple(torch.randn(3, 5, n, dtype=torch.float64, generator=generator) for n in (8, 3))  # type: ignore


def trained(tuned: pg.Program, net: nn.Module | None = None) -> None:
    net = tuned.module() if net is None else net
    run = tuned.training(net, steps=STEPS)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    for x, y in batches():
        ((net(x) - y).square().mean() + run.penalty()).backward()
        optimizer.step()
        run.step()
        optimizer.zero_grad()


def theirs(net: nn.Module) -> Any:
    config = peft.AdaLoraConfig(
        target_modules=["up", "down"],
        init_r=6,
        target_r=3,
        lora_alpha=12,
        tinit=2,
        tfinal=4,
        deltaT=2,
        total_step=STEPS,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(WithLoss(copy.deepcopy(net)), config).double()  # type: ignore


def test_every_step_is_that_of_peft(base: tuple[nn.Module, pg.Program]) -> None:
    tuned, other = base[1].apply(METHOD), theirs(base[0])
    net, layers = tuned.module(), {name: getattr(other.base_model.model.net, name) for name in ("up", "down")}
    pairs = [
        (net.get_parameter(f"{layer}.{ours}"), getattr(module, name)["default"])
        for layer, module in layers.items()
        for ours, name in LEAVES.items()
    ]
    with torch.no_grad():
        for own, its in pairs:
            own.copy_(its)
    run = tuned.training(net, steps=STEPS)
    # peft lets the rank in its scale train as well; its own directory does not hold it
    its_parameters = [p for name, p in other.named_parameters() if p.requires_grad and "ranknum" not in name]
    optimizers = [torch.optim.AdamW(p, lr=1e-2) for p in ([own for own, _ in pairs], its_parameters)]
    ranks: list[int] = []
    for step, (x, y) in enumerate(batches()):
        loss = (net(x) - y).square().mean() + run.penalty()
        its_loss = other.base_model(x, y).loss
        assert float((loss - its_loss).detach().abs()) < 1e-12
        loss.backward()
        its_loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        run.step()
        other.base_model.update_and_allocate(step)
        for optimizer in optimizers:
            optimizer.zero_grad()
        assert max(float((own - its).detach().abs().max()) for own, its in pairs) < 1e-12, step
        ranks.append(sum(int((own != 0).sum()) for own, _ in pairs[1::3]))
    assert ranks[:3] == [12, 12, 12]
    assert ranks[-4:] == [6, 6, 6, 6]
    assert 6 < ranks[4] < 12


def test_it_becomes_loras_of_the_learned_ranks_and_folds(base: tuple[nn.Module, pg.Program]) -> None:
    tuned = base[1].apply(METHOD)
    trained(tuned)
    ranks = {change.site: change.rank for change in tuned.count().changes}
    assert sum(rank or 0 for rank in ranks.values()) == 6
    table = str(tuned.ranks()).split()
    assert sorted(table[4:]) == sorted(str(rank) for rank in ranks.values())
    assert table[:4] == ["layer", "ffn.up", "ffn.down", "0"]
    assert tuned.ranks().svg.count("<rect") == 2
    final = tuned.finalize()
    methods = [applied.method for applied in final.history]
    assert all(isinstance(one, LoRA) for one in methods)
    assert {change.site: change.rank for change in final.count().changes} == ranks
    x = next(batches())[0]
    want = tuned.module().eval()(x)
    assert float((final.module().eval()(x) - want).detach().abs().max()) < 1e-12
    assert float((pg.fold(tuned).module().eval()(x) - want).detach().abs().max()) < 1e-12


def test_peft_reads_it_and_it_reads_peft(base: tuple[nn.Module, pg.Program], tmp_path: Path) -> None:
    net, program = base
    tuned = program.apply(METHOD)
    trained(tuned)
    x = next(batches())[0]
    want = tuned.module().eval()(x)
    directory = tuned.save_adapter(tmp_path / "ours", format="peft")
    pattern = json.loads((directory / "adapter_config.json").read_text())["rank_pattern"]
    assert sum(map(sum, pattern.values())) == 6
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*rank_pattern keys did not match")  # of peft's own files as well
        read = peft.PeftModel.from_pretrained(copy.deepcopy(net), str(directory)).eval()
    assert float((read.base_model.model(x) - want).detach().abs().max()) < 1e-12
    back = program.load_adapter(directory)
    assert isinstance(back.recipe, AdaLoRA)
    assert replace(back.recipe, at=METHOD.at) == METHOD
    assert torch.equal(back.module().eval()(x), want)
    read.save_pretrained(str(tmp_path / "theirs"))
    assert torch.equal(program.load_adapter(tmp_path / "theirs").module().eval()(x), want)


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_parts_of_fused_weights_in_pefts_format(name: str, tmp_path: Path) -> None:
    tuned = zoo.randomise(zoo.traced(name).apply(AdaLoRA(at="attention.*", rank=3, target_rank=2)), 0.2)
    with torch.no_grad():
        next(value for key, value in tuned.table.trainable.items() if key.endswith("_e"))[0] = 0
    directory = tuned.save_adapter(tmp_path / "a", format="peft")
    inputs = zoo.example(name)
    back = zoo.traced(name).load_adapter(directory)
    for ours, again in zip(
        zoo.leaves(tuned.module().eval()(**inputs)), zoo.leaves(back.module().eval()(**inputs)), strict=True
    ):
        assert float((ours - again).detach().abs().max()) < 1e-6


def test_refusals(base: tuple[nn.Module, pg.Program]) -> None:
    tuned = base[1].apply(METHOD)
    net = tuned.module()
    with pytest.raises(pg.RecipeError, match="leave none of 6 steps"):
        tuned.training(net, steps=6)
    with pytest.raises(pg.RecipeError, match="target_rank must be 1 to 4, got 5"):
        AdaLoRA(rank=4, target_rank=5)
    run = tuned.training(net, steps=STEPS)
    with pytest.raises(pg.PeftGraphError, match=r"adalora has a term of the loss, and run.penalty\(\) was not called"):
        run.step()
    run.penalty()
    with pytest.raises(pg.PeftGraphError, match="has no gradient. Call run.step"):
        run.step()
    with pytest.raises(pg.AdapterError, match="linear layers and convolutions alone"):
        zoo.traced("mixtral").apply(AdaLoRA(at="ffn.down", rank=2, target_rank=1)).save_adapter("unused", format="peft")
