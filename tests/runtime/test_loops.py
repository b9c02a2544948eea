"""Other training loops take a program's module as they take any: they end at the weights of a plain loop."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn
from torch.utils.data import DataLoader

import peftgraph as pg
from peftgraph.passes import LoRA, Prefix

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # their own, while they are imported
    import accelerate
    import pytorch_lightning as lightning

RATE = 1e-2
Batch = dict[str, Tensor]


def batches() -> DataLoader[Batch]:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, zoo.VOCAB, (7,), generator=generator) for _ in range(6)]
    dataset: Any = [{"idx": row, "targets": row} for row in rows]
    return DataLoader(dataset, batch_size=2)


def module() -> nn.Module:
    program = pg.trace(zoo.build("nano"), next(iter(batches())))
    torch.manual_seed(1)
    return zoo.randomise(program.apply(LoRA(rank=2), Prefix(length=2, hidden=None))).module().eval()


def trained(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in net.named_parameters() if p.requires_grad}


@pytest.fixture(scope="module")
def plain() -> dict[str, Tensor]:
    """The weights after a plain loop."""
    net = module()
    before = trained(net)
    optimizer = torch.optim.AdamW((p for p in net.parameters() if p.requires_grad), lr=RATE)
    for batch in batches():
        optimizer.zero_grad()
        net(**batch)["loss"].backward()
        optimizer.step()
    after = trained(net)
    assert all(not torch.equal(after[name], value) for name, value in before.items())
    return after


def assert_same(net: nn.Module, plain: dict[str, Tensor]) -> None:
    found = trained(net)
    assert found.keys() == plain.keys()
    for name, value in found.items():
        assert torch.equal(value, plain[name]), name


def test_accelerate(plain: dict[str, Tensor]) -> None:
    net = module()
    accelerator = accelerate.Accelerator(cpu=True)
    optimizer = torch.optim.AdamW((p for p in net.parameters() if p.requires_grad), lr=RATE)
    prepared, optimizer, loader = accelerator.prepare(net, optimizer, batches())
    for batch in loader:
        optimizer.zero_grad()
        accelerator.backward(prepared(**batch)["loss"])
        optimizer.step()
    assert_same(accelerator.unwrap_model(prepared), plain)


class Lit(lightning.LightningModule):
    """A program in Lightning."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Batch, index: int) -> Tensor:
        self.net.eval()  # no dropout, so that runs can be compared
        return self.net(**batch)["loss"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=RATE)


@pytest.mark.filterwarnings("ignore")  # Lightning's own, of workers and of loggers that are not installed
def test_lightning(plain: dict[str, Tensor], tmp_path: Path) -> None:
    net = module()
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(Lit(net), batches())
    assert_same(net, plain)
