"""Adapters on a base of half precision: float32 parameters, products in float32, values of the base's dtype."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import zoo
from torch import nn

import peftgraph as pg
from peftgraph.authoring import Pass
from peftgraph.passes import IA3, DoRA, LoRA, Prefix, Prompt, SerialAdapter

BF16 = torch.bfloat16
IDS = torch.arange(12).view(2, 6)
EVERY = [
    LoRA(rank=2),
    DoRA(rank=2),
    IA3(),
    SerialAdapter(width=2),
    Prefix(length=2, hidden=4),
    Prompt(length=2),
    LoRA(at="embedding", rank=2),
]


@pytest.mark.parametrize("method", EVERY, ids=lambda method: method.word)
def test_parameters_are_float32_and_values_the_base_s(method: Pass) -> None:
    program = zoo.traced("nano", "sdpa", BF16)
    tuned = program.apply(method)
    assert {p.dtype for p in tuned.table.trainable.values()} == {torch.float32}
    net = tuned.module().train()
    logits = net(idx=IDS)["logits"]
    assert logits.dtype == BF16
    logits.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in tuned.table.trainable.values())
    same = program.apply(method, dtype=BF16)
    assert {p.dtype for p in same.table.trainable.values()} == {BF16}
    assert same.module().eval()(idx=IDS)["logits"].dtype == BF16
    assert tuned.remove().text() == program.text()


def test_small_steps_are_not_lost_and_nothing_is_rounded(tmp_path: Path) -> None:
    """A weight of 1 and steps of 2^-12 stand still in bfloat16, whose numbers there are 2^-7 apart."""
    program = zoo.traced("nano", "sdpa", BF16)
    tuned = program.apply(LoRA(rank=2))
    with torch.no_grad():
        for p in tuned.table.trainable.values():
            p.fill_(1.0).add_(2.0**-12)
    tuned.save_adapter(tmp_path)
    loaded = program.load_adapter(tmp_path)
    assert all(bool((p == 1 + 2.0**-12).all()) for p in loaded.table.trainable.values())
    for name in ("a", "b"):
        assert {p.dtype for p in program.apply(LoRA(rank=2, name=name)).mix({name: 2.0}).table.trainable.values()} == {
            torch.float32
        }


def test_a_fold_rounds_once() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 4)).to(BF16)
    x = torch.randn(3, 16, dtype=BF16)
    tuned = pg.trace(model, (x,)).apply(LoRA(at="projection", rank=4, alpha=8.0))
    with torch.no_grad():
        for p in tuned.table.trainable.values():
            p.copy_(torch.randn_like(p) * 0.1)
    a, b = (tuned.table.trainable[f"0.lora_{name}"].detach().double() for name in "AB")
    exact = (model[0].weight.double() + 2 * b @ a).to(BF16)
    assert torch.equal(pg.fold(tuned).write_back(copy.deepcopy(model))[0].weight, exact)


def test_the_dtype_of_a_moved_module_is_followed() -> None:
    tuned = zoo.traced("nano", "sdpa", BF16).apply(LoRA(rank=2), SerialAdapter(width=2))
    net = tuned.module().eval().to(torch.float32)
    assert net(idx=IDS)["logits"].dtype == torch.float32
    assert net.to(BF16)(idx=IDS)["logits"].dtype == BF16
