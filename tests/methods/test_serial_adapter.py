"""The serial adapter: the equation in both kinds of blocks, how it starts, its published sizes and its text."""

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
from peftgraph.passes import SerialAdapter

D = zoo.WIDTH
ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}


class Bottleneck(nn.Module):
    """h + W_up act(W_down h + b_down) + b_up."""

    def __init__(self, width: int, activation: str, dropout: float = 0.0) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(D, width).double(), nn.Linear(width, D).double()
        self.act, self.drop = ACTIVATIONS[activation](), nn.Dropout(dropout)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.up(self.drop(self.act(self.down(h))))


def pairs(adapters: dict[str, Bottleneck]) -> dict[str, Tensor]:
    sides = [
        (f"{name}.{side}", getattr(adapter, side)) for name, adapter in adapters.items() for side in ("down", "up")
    ]
    return {f"{name}_{part}": getattr(linear, part) for name, linear in sides for part in ("weight", "bias")}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_equation_in_a_pre_norm_block(bench: Any, activation: str, training: bool) -> None:
    """The adapter stands after the sublayer's dropout and before the residual add."""
    method = SerialAdapter(width=5, activation=activation, dropout=0.2)
    tuned = zoo.randomise(bench.program.apply(method), 0.2)
    reference = bench.plain()
    block = reference.stack[0]
    places = {f"stack.0.{role}_serial_adapter": Bottleneck(5, activation, 0.2) for role in ("attention", "ffn")}
    first, second = places.values()
    block.first, block.second = first, second

    def forward(x: Tensor) -> Tensor:
        b, s, d = x.shape
        q, k, v = (t.view(b, s, block.heads, -1).transpose(1, 2) for t in block.mix(block.n1(x)).split(d, dim=2))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + first(block.drop(block.out(y.transpose(1, 2).reshape(b, s, d))))
        return x + second(block.drop(block.proj(nn.functional.gelu(block.fc(block.n2(x))))))

    block.forward = forward
    bench.agree(tuned, reference, pairs(places), training)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_equation_in_a_post_norm_block(bench: Any, training: bool) -> None:
    """y = LN(x + A(drop(F(x)))): an adapter behind the dropout of BERT's two output modules."""
    tuned = zoo.randomise(zoo.traced("bert", dtype=torch.float64).apply(SerialAdapter(width=5)), 0.2)
    reference = zoo.build("bert", dtype=torch.float64).requires_grad_(False)
    places: dict[str, Bottleneck] = {}
    for i, layer in enumerate(reference.encoder.layer):
        for role, output in (("attention.attention", layer.attention.output), ("ffn", layer.output)):
            adapter = places[f"encoder.layer.{i}.{role}_serial_adapter"] = Bottleneck(5, "gelu")
            output.dropout = nn.Sequential(output.dropout, adapter)
    type(bench)(bench.program, zoo.example("bert")).agree(tuned, reference, pairs(places), training)


def test_how_it_starts(bench: Any) -> None:
    for std in (1e-2, 1e-3):
        p = bench.program.apply(SerialAdapter(width=60, std=std)).table.trainable
        down = torch.cat([value.detach().flatten() for name, value in p.items() if name.endswith("down_weight")])
        assert down.numel() == 2 * 60 * D
        assert 1.9 * std < float(down.abs().max()) <= 2 * std
        assert float(down.std()) == pytest.approx(0.8796 * std, rel=0.05)  # of a normal truncated at two deviations
        assert float(down.mean()) == pytest.approx(0, abs=0.05 * std)
        assert not any(value.any() for name, value in p.items() if not name.endswith("down_weight"))


def test_it_refuses_to_fold(bench: Any) -> None:
    tuned = bench.program.apply(SerialAdapter(width=5))
    with pytest.raises(pg.NoFold) as caught:
        pg.fold(tuned)
    reason = "serial_adapter: it is nonlinear, so no weight can express it"
    assert caught.value.reasons == [f"0.{role}: {reason}" for role in ("attention", "ffn")]


# model, width, how many times the traced layers the model has, 2 L (2 d m + m + d)
SIZES = [
    ("bert-base", 64, 1, 24 * (2 * 768 * 64 + 64 + 768)),
    ("roberta-large", 8, 24, 835_968),
    ("roberta-large", 64, 24, 6_343_680),
    ("gpt3", 1, 96, 7_078_080),
    ("gpt3", 8, 96, 40_109_568),
]


@pytest.mark.parametrize(("model", "width", "times", "size"), SIZES)
def test_published_sizes(real: Any, model: str, width: int, times: int, size: int) -> None:
    count = real(model).apply(SerialAdapter(width=width)).count()
    assert count.trainable == count.added
    assert count.changed == 0
    assert count.trainable * times == size


def test_the_one_adapter_after_the_feed_forward(real: Any) -> None:
    assert real("bert-base").apply(SerialAdapter(at="ffn", width=48)).count().trainable == 894_528


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0}, "serial_adapter: width must be at least 1, got 0."),
        ({"dropout": 1.0}, "serial_adapter: dropout must lie in [0, 1), got 1.0."),
        ({"std": 0.0}, "serial_adapter: std must be positive, got 0.0."),
        (
            {"activation": "softplus"},
            "serial_adapter: activation must be one of relu, gelu, gelu_tanh, silu, tanh, sigmoid, got 'softplus'.",
        ),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(pg.RecipeError) as caught:
        SerialAdapter(**options)
    assert str(caught.value) == message


@settings(max_examples=60)
@given(
    at=st.sampled_from(["attention|ffn", "ffn&layers(1,3)", "attention"]),
    width=st.integers(1, 4096),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    dropout=st.floats(0, 1, exclude_max=True),
    std=st.floats(1e-6, 10),
    name=st.sampled_from(["", "a", "left_2"]),
)
def test_spec_round_trip(**options: Any) -> None:
    method = SerialAdapter(**options)
    assert pg.parse_pass(str(method)) == method
    assert str(pg.parse_pass(str(method))) == str(method)


DIFF = """
    serial_adapter{at=ffn width=4 activation="gelu" dropout=0.1 std=0.01}
        %0.dropout_2: f32[B, S, 48] = dropout(%0.ffn.down, 0.1, True)
      + %0.ffn.serial_adapter.linear: f32[B, S, 4] = linear(%0.dropout_2, @stack.0.ffn_serial_adapter.down_weight*, @stack.0.ffn_serial_adapter.down_bias*)
      + %0.ffn.serial_adapter.gelu: f32[B, S, 4] = gelu(%0.ffn.serial_adapter.linear)
      + %0.ffn.serial_adapter.dropout: f32[B, S, 4] = dropout(%0.ffn.serial_adapter.gelu, 0.1, True)
      + %0.ffn.serial_adapter.linear#2: f32[B, S, 48] = linear(%0.ffn.serial_adapter.dropout, @stack.0.ffn_serial_adapter.up_weight*, @stack.0.ffn_serial_adapter.up_bias*)
      + %0.ffn.serial_adapter.add: f32[B, S, 48] = add(%0.dropout_2, %0.ffn.serial_adapter.linear#2)
      - %0.add_3: f32[B, S, 48] = add(%0.add_2, %0.dropout_2)
      + %0.add_3: f32[B, S, 48] = add(%0.add_2, %0.ffn.serial_adapter.add)
    1 site, +5 nodes, -0 nodes, 1 line changed, +4 parameters (436 trainable values)
"""  # noqa: E501
COUNT = "trainable 436 (1.6495 %), added 436, changed 0, total 26,432; changes: none"


def test_text(nano: pg.Program) -> None:
    tuned = nano.apply(SerialAdapter(at="ffn", width=4, dropout=0.1))
    assert tuned.diff(nano) == dedent(DIFF).lstrip("\n")
    assert str(tuned.count()) == COUNT
    assert tuned.remove().text() == nano.text()
