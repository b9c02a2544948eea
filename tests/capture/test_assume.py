"""Sides of branches by values, which the caller says: they are written in the program and checked at every call."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftgraph as pg

X = torch.randn(3, 7, 6, generator=torch.Generator().manual_seed(1))


class Masked(nn.Linear):
    table: Tensor

    def __init__(self) -> None:
        super().__init__(6, 5)
        self.register_buffer("table", torch.tensor([0.0, 1.0]))

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        y = super().forward(input)
        if mask is None:
            return y
        hidden = self.table[mask.long()]
        if not hidden.any():  # here
            return y
        return y.masked_fill(hidden[..., None] > 0, 0.0)


class Weights(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        y = super().forward(input)
        return y if y.sum() > 0 else -y  # here


def place(cls: type) -> str:
    lines, start = inspect.getsourcelines(cls)
    return f"test_assume.py:{start + next(i for i, line in enumerate(lines) if '# here' in line)}"


NONE, SOME = (
    torch.zeros(3, 7, dtype=torch.bool),
    torch.zeros(3, 7, dtype=torch.bool).index_fill(1, torch.tensor([5]), True),
)


def test_the_refusal_says_what_can_be_assumed() -> None:
    with pytest.raises(pg.TraceError) as caught:
        pg.trace(Masked(), (X, NONE))
    assert f"assume={{'{place(Masked)}': False}} takes the truth" in str(caught.value)


@pytest.mark.parametrize(("side", "right", "wrong"), [(False, NONE, SOME), (True, SOME, NONE)])
def test_a_side_is_checked_at_every_call(side: bool, right: Tensor, wrong: Tensor) -> None:
    model = Masked().requires_grad_(False)
    program = pg.trace(model, (X, right), assume={f"capture/{place(Masked)}": side})
    assert f"  assumes capture/{place(Masked)} is {side}: if not hidden.any():  # here\n" in program.text()
    assert ("masked_fill" in program.text()) is side
    net = program.module()
    assert torch.equal(net(X, right), model(X, right))
    with pytest.raises(pg.CallError, match=rf"assume=.*{side}.* does not hold at 'if not hidden.any\(\):"):
        net(X, wrong)


def test_a_call_without_the_input_asks_for_nothing() -> None:
    model = Masked().requires_grad_(False)
    net = pg.trace(model, (X, NONE), assume={place(Masked): False}).module()
    assert torch.equal(net(X), model(X))


@pytest.mark.parametrize(
    ("model", "inputs", "assume", "words"),
    [
        (Masked(), (X, SOME), {place(Masked): False}, "what was assumed does not hold"),
        (Masked(), (X, NONE), {place(Masked): False, "other.py:3": True}, "assume names 'other.py:3', but no tensor"),
        (Weights(6, 5), (X,), {place(Weights): True}, "depends on the weights \\(weight\\), which passes change"),
    ],
)
def test_what_cannot_be_assumed(model: nn.Module, inputs: Any, assume: dict[str, bool], words: str) -> None:
    with pytest.raises(pg.TraceError, match=words):
        pg.trace(model, inputs, assume=assume)
