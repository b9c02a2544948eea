"""Buffers that training writes belong to the adapted program."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import peftgraph as pg
from peftgraph.passes import FreezeStatistics, LoRA, Train


class Averaged(nn.Module):
    """A batch norm, and a moving average of the model's own that evaluation takes off."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6), nn.Linear(6, 4)
        self.register_buffer("mean", torch.zeros(6), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm(self.conv(x))).mean(-1)
        if self.training:
            self.mean.mul_(0.9).add_(0.1 * h.detach().mean(0))
        return self.head(h - self.mean)


@pytest.fixture(scope="module")
def averaged() -> tuple[nn.Module, Tensor, pg.Program]:
    torch.manual_seed(0)
    model, x = Averaged().eval(), torch.randn(8, 3, 9) * 3 + 1
    return model, x, pg.trace(model, (x,))


def train(net: nn.Module, x: Tensor, steps: int = 4) -> None:
    net.train()
    for _ in range(steps):
        net(x)
    net.eval()


def test_what_training_writes_is_kept_everywhere(
    averaged: tuple[nn.Module, Tensor, pg.Program], tmp_path: Path
) -> None:
    model, x, program = averaged
    before = copy.deepcopy(model.state_dict()), model(x).detach()
    tuned = program.apply(LoRA(at="weight", rank=2))
    net = tuned.module()
    train(net, x)
    expected = net(x).detach()
    assert (expected - before[1]).abs().max() > 1e-2
    assert torch.equal(tuned.module().eval()(x), expected)
    tuned.save_adapter(tmp_path)
    torch.testing.assert_close(program.load_adapter(tmp_path).module().eval()(x), expected, rtol=0, atol=0)
    merged = pg.fold(tuned)
    assert len(merged.proof.state) == 4
    torch.testing.assert_close(merged.write_back(copy.deepcopy(model)).eval()(x), expected, rtol=0, atol=1e-6)
    assert tuned.count().state == 3 * 6 + 1
    # Neither the model, nor its program, nor another adapted one sees any of it.
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before[0].values(), strict=True))
    torch.testing.assert_close(program.apply(LoRA(at="head", rank=2)).module().eval()(x), before[1], rtol=0, atol=0)
    assert tuned.remove().table.hashes() == program.table.hashes()


def test_state_moves_with_its_module(averaged: tuple[nn.Module, Tensor, pg.Program]) -> None:
    _, x, program = averaged
    tuned = program.apply(LoRA(at="head", rank=2))
    net = tuned.module().double()
    train(net, x.double())
    assert torch.equal(net.get_buffer("norm.running_mean"), tuned.table["norm.running_mean"].tensor)
    assert tuned.table["norm.running_mean"].tensor.abs().max() > 0.1


def test_statistics_can_stand_still(averaged: tuple[nn.Module, Tensor, pg.Program]) -> None:
    model, x, program = averaged
    tuned = program.apply(FreezeStatistics(), LoRA(at="conv", rank=2))
    net = tuned.module()
    still = copy.deepcopy(model).train()
    still.norm.eval()
    torch.testing.assert_close(net.train()(x), still(x), rtol=0, atol=1e-5)
    train(net, x)
    assert torch.equal(net.get_buffer("norm.running_mean"), model.norm.running_mean)
    assert int(net.get_buffer("norm.num_batches_tracked")) == int(model.norm.num_batches_tracked)  # nothing is counted
    assert tuned.remove().remove().text() == program.text()
    assert pg.fold(tuned).history == ()
    with pytest.raises(pg.NoMatch, match="keeps running statistics"):
        pg.trace(nn.LayerNorm(4), (torch.randn(2, 4),)).apply(FreezeStatistics())


def test_a_norm_that_peft_saves_with_its_buffers_is_read(tmp_path: Path) -> None:
    import peft

    model, x = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)), torch.randn(8, 5) + 1
    config = peft.LoraConfig(target_modules=["0"], r=2, modules_to_save=["1"], init_lora_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    train(theirs, x)
    theirs.save_pretrained(tmp_path)
    tuned = pg.trace(model, (x,)).load_adapter(tmp_path)
    torch.testing.assert_close(tuned.module().eval()(x), theirs(x), rtol=0, atol=1e-6)
    assert any(isinstance(applied.method, Train) for applied in tuned.history)
