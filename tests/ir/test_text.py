"""The printer: golden texts as two dedented strings, names that come from sites, determinism."""

from __future__ import annotations

from textwrap import dedent

import torch
import zoo
from torch import Tensor, nn

import peftgraph as pg
from peftgraph.passes import IA3, BitFit, LoRA


class Gated(nn.Module):
    """One gated feed-forward with a residual: small enough to print whole."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(4, 6), nn.Linear(4, 6, bias=False), nn.Linear(6, 4)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.down(nn.functional.silu(self.gate(x)) * self.up(x)))


def program() -> pg.Program:
    return pg.trace(Gated(), (torch.randn(3, 7, 4),))


def test_the_text_of_a_program() -> None:
    want = """\
        Gated(x: f32[B, S, 4]) -> {output: f32[B, S, 4]}
          %0.ffn.gate: f32[B, S, 6] = linear(%x, @gate.weight)
          %0.silu: f32[B, S, 6] = silu(%0.ffn.gate)
          %0.ffn.up: f32[B, S, 6] = linear(%x, @up.weight, @up.bias)
          %0.ffn.hidden: f32[B, S, 6] = mul(%0.silu, %0.ffn.up)
          %0.ffn.down: f32[B, S, 4] = linear(%0.ffn.hidden, @down.weight, @down.bias)
          %0.dropout: f32[B, S, 4] = dropout(%0.ffn.down, 0.5, True)
          %0.add: f32[B, S, 4] = add(%x, %0.dropout)
          return [%0.add]
        """
    assert program().text() == dedent(want)


def test_the_difference_that_a_pass_makes() -> None:
    base = program()
    want = """\
        lora{at=ffn.up rank=2 alpha=4.0 dropout=0.0 init="kaiming"}
        ia3{at=ffn.hidden}
            %0.ffn.up: f32[B, S, 6] = linear(%x, @up.weight, @up.bias)
          + %0.ffn.up.lora.linear: f32[B, S, 2] = linear(%x, @up.lora_A*)
          + %0.ffn.up.lora.linear#2: f32[B, S, 6] = linear(%0.ffn.up.lora.linear, @up.lora_B*)
          + %0.ffn.up.lora.mul: f32[B, S, 6] = mul(%0.ffn.up.lora.linear#2, 2.0)
          + %0.ffn.up.lora.add: f32[B, S, 6] = add(%0.ffn.up, %0.ffn.up.lora.mul)
          - %0.ffn.hidden: f32[B, S, 6] = mul(%0.silu, %0.ffn.up)
          + %0.ffn.hidden: f32[B, S, 6] = mul(%0.silu, %0.ffn.up.lora.add)
          + %0.ffn.hidden.ia3.mul: f32[B, S, 6] = mul(%0.ffn.hidden, @down.ia3_l*)
          - %0.ffn.down: f32[B, S, 4] = linear(%0.ffn.hidden, @down.weight, @down.bias)
          + %0.ffn.down: f32[B, S, 4] = linear(%0.ffn.hidden.ia3.mul, @down.weight, @down.bias)
        2 sites, +5 nodes, -0 nodes, 2 lines changed, +3 parameters (26 trainable values)
        """
    tuned = base.apply(LoRA(at="ffn.up", rank=2, alpha=4.0), IA3(at="ffn.hidden"))
    assert tuned.diff(base) == dedent(want)


def test_a_trained_bias_is_starred() -> None:
    line = next(line for line in program().apply(BitFit()).text().splitlines() if "%0.ffn.up:" in line)
    assert line.endswith("@up.weight, @up.bias*)")


def test_two_traces_print_alike() -> None:
    assert pg.trace(zoo.build("gpt2"), zoo.example("gpt2", 5, 11)).text() == zoo.traced("gpt2").text()


def test_a_difference_to_itself_is_empty() -> None:
    base = zoo.traced("nano")
    assert base.diff(base) == "0 sites, +0 nodes, -0 nodes, 0 lines changed, +0 parameters (0 trainable values)\n"


def test_every_value_in_the_text_is_defined_once() -> None:
    for name in zoo.NAMES:
        lines = zoo.traced(name).text().splitlines()[1:-1]
        names = [line.split(":")[0] for line in lines]
        assert len(names) == len(set(names)), name
