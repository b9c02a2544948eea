"""(IA)^3: the equation and its gradients, how it starts, its published sizes and its text."""

from __future__ import annotations

from textwrap import dedent
from typing import Any

import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import peftgraph as pg
from peftgraph.passes import IA3, LoRA

D, F = zoo.WIDTH, zoo.FFN


class ScaledFused(nn.Module):
    """l_k on the second third of a fused projection, l_v on the last."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.k_O = nn.Parameter(torch.ones(D, dtype=torch.float64))
        self.v_O = nn.Parameter(torch.ones(D, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.base(x).split(D, dim=-1)
        return torch.cat([q, self.k_O * k, self.v_O * v], dim=-1)


class ScaledHidden(nn.Module):
    """l_ff on what enters the second matrix of the feed-forward."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.l_F = nn.Parameter(torch.ones(F, dtype=torch.float64))

    def forward(self, h: Tensor) -> Tensor:
        return self.base(self.l_F * h)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_equation(bench: Any, training: bool) -> None:
    tuned = zoo.randomise(bench.program.apply(IA3()), 0.3)
    reference = bench.plain()
    block = reference.stack[0]
    block.mix, block.proj = ScaledFused(block.mix), ScaledHidden(block.proj)
    same = {
        "stack.0.mix.k.ia3_l": block.mix.k_O,
        "stack.0.mix.v.ia3_l": block.mix.v_O,
        "stack.0.proj.ia3_l": block.proj.l_F,
    }
    bench.agree(tuned, reference, same, training)


def test_fold_is_the_weight_of_the_equation(bench: Any) -> None:
    tuned = zoo.randomise(bench.program.apply(IA3()), 0.3)
    p, before, after = tuned.table.trainable, bench.program.table, pg.fold(tuned).table
    rows = torch.cat([torch.ones(D, dtype=torch.float64), p["stack.0.mix.k.ia3_l"], p["stack.0.mix.v.ia3_l"]])
    for name, expected in {
        "stack.0.mix.weight": rows[:, None] * before["stack.0.mix.weight"].tensor,
        "stack.0.mix.bias": rows * before["stack.0.mix.bias"].tensor,
        "stack.0.proj.weight": before["stack.0.proj.weight"].tensor * p["stack.0.proj.ia3_l"],
    }.items():
        torch.testing.assert_close(after[name].tensor, expected, rtol=1e-15, atol=0)
    assert after["stack.0.proj.bias"].tensor is before["stack.0.proj.bias"].tensor


def test_a_fresh_pass_is_all_ones(bench: Any) -> None:
    p = bench.program.apply(IA3()).table.trainable
    assert {name: tuple(value.shape) for name, value in p.items()} == {
        "stack.0.mix.k.ia3_l": (D,),
        "stack.0.mix.v.ia3_l": (D,),
        "stack.0.proj.ia3_l": (F,),
    }
    assert all(bool((value == 1).all()) for value in p.values())


# model, how many times the traced layers the model has, L_enc (d_k + d_v + f) + L_dec (2 d_k + 2 d_v + f)
SIZES = [
    ("bert-base", 1, 55_296),
    ("roberta-large", 24, 24 * (2 * 1024 + 4096)),
    ("gpt2-medium", 24, 24 * (2 * 1024 + 4096)),
    ("llama-7b", 32, 32 * (2 * 4096 + 11008)),
    ("t5-xl", 24, 540_672),
]


@pytest.mark.parametrize(("model", "times", "size"), SIZES)
def test_published_sizes(real: Any, model: str, times: int, size: int) -> None:
    count = real(model).apply(IA3()).count()
    assert count.trainable == count.added
    assert count.trainable * times == size


def test_a_norm_on_the_keys_stands_after_the_scale() -> None:
    """l scales what k_proj gives; a norm of the keys follows, so it folds, and its overall size has no effect."""
    from transformers import Qwen3Config, Qwen3Model

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=zoo.VOCAB, hidden_size=48, intermediate_size=80, num_hidden_layers=1, num_attention_heads=6,
        num_key_value_heads=2, head_dim=8, pad_token_id=0,
    )  # fmt: skip
    inputs = zoo.example("llama")
    base = pg.trace(Qwen3Model(config).eval().to(torch.float64), inputs)
    tuned = base.apply(IA3(at="attention.k"))
    (l_K,) = tuned.table.trainable.values()
    assert l_K.shape == (16,)
    before = tuned.module().eval()(**inputs)["last_hidden_state"].detach()
    with torch.no_grad():
        l_K.fill_(3.0)
    same = tuned.module().eval()(**inputs)["last_hidden_state"].detach()
    assert float((same - before).abs().max()) < 1e-4  # up to the norm's epsilon
    zoo.randomise(tuned, 0.5)
    moved = tuned.module().eval()(**inputs)["last_hidden_state"].detach()
    assert float((moved - before).abs().max()) > 1e-3
    folded = pg.fold(tuned).module().eval()(**inputs)["last_hidden_state"].detach()
    torch.testing.assert_close(moved, folded, rtol=0, atol=1e-12)


def test_a_place_without_a_weight_is_refused(bench: Any) -> None:
    with pytest.raises(pg.RecipeError) as caught:
        bench.program.apply(IA3(at="ffn"))
    expected = "ia3: 0.ffn has no weight to fold a scale into; choose projections or ffn.hidden."
    assert str(caught.value) == expected


@settings(max_examples=20)
@given(
    at=st.sampled_from(["attention.k|attention.v|ffn.hidden", "attention.k&layers(0)", "ffn.hidden|attention.*"]),
    name=st.sampled_from(["", "a", "left_2"]),
)
def test_spec_round_trip(**options: Any) -> None:
    method = IA3(**options)
    assert pg.parse_pass(str(method)) == method
    assert str(pg.parse_pass(str(method))) == str(method)


DIFF = """
    ia3{at=attention.k|attention.v|ffn.hidden}
        %0.attention.q+k+v: f32[B, S, 144] = linear(%0.norm.0, @stack.0.mix.weight, @stack.0.mix.bias)
      + %0.attention.k.ia3.slice: f32[B, S, 48] = slice(%0.attention.q+k+v, -1, 48, 96)
      + %0.attention.k.ia3.mul: f32[B, S, 48] = mul(%0.attention.k.ia3.slice, @stack.0.mix.k.ia3_l*)
      + %0.attention.k.ia3.slice_scatter: f32[B, S, 144] = slice_scatter(%0.attention.q+k+v, %0.attention.k.ia3.mul, -1, 48, 96)
      + %0.attention.v.ia3.slice: f32[B, S, 48] = slice(%0.attention.k.ia3.slice_scatter, -1, 96, 144)
      + %0.attention.v.ia3.mul: f32[B, S, 48] = mul(%0.attention.v.ia3.slice, @stack.0.mix.v.ia3_l*)
      + %0.attention.v.ia3.slice_scatter: f32[B, S, 144] = slice_scatter(%0.attention.k.ia3.slice_scatter, %0.attention.v.ia3.mul, -1, 96, 144)
      - %0.split: (f32[B, S, 48], f32[B, S, 48], f32[B, S, 48]) = split(%0.attention.q+k+v, 48, 2)
      + %0.split: (f32[B, S, 48], f32[B, S, 48], f32[B, S, 48]) = split(%0.attention.v.ia3.slice_scatter, 48, 2)
        %0.ffn.hidden: f32[B, S, 80] = gelu(%0.ffn.up)
      + %0.ffn.hidden.ia3.mul: f32[B, S, 80] = mul(%0.ffn.hidden, @stack.0.proj.ia3_l*)
      - %0.ffn.down: f32[B, S, 48] = linear(%0.ffn.hidden, @stack.0.proj.weight, @stack.0.proj.bias)
      + %0.ffn.down: f32[B, S, 48] = linear(%0.ffn.hidden.ia3.mul, @stack.0.proj.weight, @stack.0.proj.bias)
    3 sites, +7 nodes, -0 nodes, 2 lines changed, +3 parameters (176 trainable values)
"""  # noqa: E501
COUNT = "trainable 176 (0.6659 %), added 176, changed 8,544, total 26,432; changes: full rank in 3 matrices, 2 vectors"


def test_text(nano: pg.Program) -> None:
    tuned = nano.apply(IA3())
    assert tuned.diff(nano) == dedent(DIFF).lstrip("\n")
    assert str(tuned.count()) == COUNT
    assert tuned.remove().text() == nano.text()


class ScaledInput(nn.Module):
    """l on what a projection reads."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.l_I = nn.Parameter(torch.ones(base.in_features, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(self.l_I * x)


def test_the_input_of_a_projection(bench: Any) -> None:
    tuned = zoo.randomise(bench.program.apply(IA3(at="attention.o|ffn.up", side="input")), 0.3)
    reference = bench.plain()
    block = reference.stack[0]
    block.out, block.fc = ScaledInput(block.out), ScaledInput(block.fc)
    bench.agree(tuned, reference, {"stack.0.out.ia3_l": block.out.l_I, "stack.0.fc.ia3_l": block.fc.l_I}, False)
    method = tuned.history[0].method
    assert 'side="input"' in str(method)
    assert pg.parse_pass(str(method)) == method


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_an_input_and_a_low_rank_path_fold_in_either_order(first: bool) -> None:
    program, inputs = zoo.traced("nano", dtype=torch.float64), zoo.example("nano")
    methods = [IA3(at="attention.o", side="input"), LoRA(at="attention.o", rank=2)]
    tuned = zoo.randomise(program.apply(*(methods if first else methods[::-1])), 0.3)
    expected = tuned.module().eval()(**inputs)["logits"]
    torch.testing.assert_close(pg.fold(tuned).module().eval()(**inputs)["logits"], expected, rtol=0, atol=1e-12)


def test_the_input_of_a_slice_is_refused(bench: Any) -> None:
    with pytest.raises(pg.RecipeError, match="the input of 0.attention.q is no vector of its own"):
        bench.program.apply(IA3(at="attention.q", side="input"))
