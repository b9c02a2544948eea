"""LLaMA-Adapter's prefix against its equation, written out beside the attention of the original models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn

import peftgraph as pg
from peftgraph.passes import LoRA, Prefix, ZeroInitPrefix

F64 = torch.float64
LENGTH = 3


class Watched(nn.Module):
    """One attention with grouped heads and a residual add; `rows` (L, D) and `gate` (H,) put the prefix in."""

    def __init__(self, heads: int, groups: int, fused: bool) -> None:
        super().__init__()
        self.heads, self.groups, self.fused = heads, groups, fused
        self.q, self.o = nn.Linear(12, 4 * heads), nn.Linear(4 * heads, 12)
        self.k, self.v = nn.Linear(12, 4 * groups), nn.Linear(12, 4 * groups)

    def by_head(self, x: Tensor, heads: int) -> Tensor:
        x = x.unflatten(-1, (heads, 4)).transpose(-2, -3)
        return x if heads == self.heads else x.repeat_interleave(self.heads // heads, -3)

    def forward(self, x: Tensor, rows: Tensor | None = None, gate: Tensor | None = None) -> Tensor:
        q = self.by_head(self.q(x), self.heads)
        k, v = (self.by_head(p(x), self.groups) for p in (self.k, self.v))
        if self.fused:
            heads = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            scores = q @ k.transpose(-2, -1) / 2
            later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
            heads = scores.masked_fill(later, -torch.inf).softmax(-1) @ v
        if rows is not None and gate is not None:
            own_k, own_v = (self.by_head(p(rows), self.groups) for p in (self.k, self.v))
            heads = heads + gate.view(-1, 1, 1) * ((q @ own_k.transpose(-2, -1) / 2).softmax(-1) @ own_v)
        return x + self.o(heads.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize(("gate", "tanh"), [("head", False), ("layer", False), ("head", True)])
def test_outputs_and_gradients_are_the_equation_s(groups: int, fused: bool, gate: str, tanh: bool) -> None:
    torch.manual_seed(0)
    model, x = Watched(4, groups, fused).to(F64).requires_grad_(False), torch.randn(2, 5, 12, dtype=F64)
    base = pg.trace(model, (x,))
    program = base.apply(ZeroInitPrefix(length=LENGTH, gate=gate, tanh=tanh))
    assert torch.equal(program.module()(x), base.module()(x))
    zoo.randomise(program, 0.5)
    ours = {name.rpartition(".")[2]: p for name, p in program.table.trainable.items()}
    assert ours["gate"].shape == (4 if gate == "head" else 1,)
    theirs = {name: p.detach().clone().requires_grad_() for name, p in ours.items()}
    opening = theirs["gate"].tanh() if tanh else theirs["gate"]
    outputs = [program.module()(x), model(x, theirs["prefix"], opening)]
    assert float((outputs[0] - outputs[1]).abs().max().detach()) < 1e-13
    grads = [
        torch.autograd.grad(out.square().sum(), list(p.values()))
        for out, p in zip(outputs, (ours, theirs), strict=True)
    ]
    for got, wanted in zip(*grads, strict=True):
        assert float(wanted.abs().max()) > 0
        assert float((got - wanted).abs().max()) < 1e-12


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "t5", "mixtral"])
def test_both_ways_to_write_attention_agree(name: str) -> None:
    fused, written = (zoo.traced(name, attn, F64).apply(ZeroInitPrefix(length=LENGTH)) for attn in zoo.ATTENTIONS)
    zoo.randomise(fused, 0.5)
    with torch.no_grad():
        for key, value in written.table.trainable.items():
            value.copy_(fused.table[key].tensor)
    inputs = zoo.example(name, 2, 9, F64)
    a, b = (zoo.leaves(one.module().eval()(**inputs))[0].detach() for one in (fused, written))
    base = zoo.leaves(zoo.traced(name, "sdpa", F64).module().eval()(**inputs))[0]
    assert float((a - base).abs().max()) > 1e-3
    # some models take their softmax in float32
    assert float((a - b).abs().max()) < (1e-12 if name in ("bert", "gpt2", "t5") else 1e-5)


def test_it_stands_beside_a_prefix_and_lora() -> None:
    base = zoo.traced("llama", "sdpa", F64)
    program = base.apply(LoRA(rank=2), ZeroInitPrefix(length=2), LoRA(at="attention.o", rank=2, name="o"))
    while program.history:
        program = program.remove(0)
    assert program.text() == base.text()
    with pytest.raises(pg.Conflict, match="and zero_init_prefix.* both replace the output"):
        base.apply(ZeroInitPrefix(), Prefix())
    assert base.apply(Prefix(), ZeroInitPrefix()).count().trainable > 0


def test_only_a_core_has_keys() -> None:
    with pytest.raises(pg.PeftGraphError, match="is no attention core, so it has no keys"):
        zoo.traced("bert").apply(ZeroInitPrefix(at="attention.q"))


@pytest.mark.parametrize(("options", "words"), [({"length": 0}, "length must"), ({"gate": "all"}, "gate must be")])
def test_options_are_checked(options: dict[str, Any], words: str) -> None:
    with pytest.raises(pg.RecipeError, match=words):
        ZeroInitPrefix(**options)
