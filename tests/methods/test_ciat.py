"""CIAT: the equation, what enters the first block of each stack, where adapters stand."""

from __future__ import annotations

from typing import Any

import plain
import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import peftgraph as pg
from peftgraph.passes import CIAT

D = zoo.WIDTH


class Normed(nn.Module):
    """B(LN(x)), or B(x)."""

    def __init__(self, width: int, norm: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D, eps=1e-6).double() if norm else nn.Identity()
        self.bottleneck = plain.Bottleneck(width, "relu", 0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.bottleneck(self.norm(x))

    def named(self, owner: str) -> dict[str, Tensor]:
        own = {f"{owner}.norm_{part}": p for part, p in self.norm.named_parameters()}
        return own | plain.pairs({owner: self.bottleneck})


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("layer_norm", [True, False])
def test_equation(bench: Any, layer_norm: bool, training: bool) -> None:
    """e + B(LN(e)) enters the block, its residual stream included; h + B(LN(x)) leaves each sublayer."""
    method = CIAT(width=5, embedding_width=7, layer_norm=layer_norm, dropout=0.2)
    tuned = zoo.randomise(bench.program.apply(method), 0.2)
    reference = bench.plain()
    block = reference.stack[0]
    adapters = {site: Normed(5, layer_norm) for site in ("attention", "ffn")}
    block.adapters, block.embedded = nn.ModuleDict(adapters), Normed(7, True)
    plain.rewrite(block, branch=lambda site, h, read, _: h + adapters[site](read))
    inner = block.forward
    block.forward = lambda x: inner(x + block.embedded(x))
    same = block.embedded.named("stack.0.block_ciat")
    for site, adapter in adapters.items():
        same |= adapter.named(f"stack.0.{site}_ciat")
    bench.agree(tuned, reference, same, training)


def test_the_embedding_adapter_stands_before_the_dropout() -> None:
    """BERT drops its embeddings after their norm: under train() the dropout reads the adapted value."""
    tuned = zoo.traced("bert").apply(CIAT(width=3))
    readers = [line for line in tuned.text().splitlines() if "(%0.block.ciat.add," in line]
    assert len(readers) == 1
    assert "= dropout(" in readers[0]


def test_each_stack_has_one_and_cross_attention_none() -> None:
    tuned = zoo.traced("t5").apply(CIAT(width=3))
    sites = [edit.site for edit in tuned.edits]
    assert sites[:2] == ["encoder.0.block", "decoder.0.block"]
    assert not any("cross" in site for site in sites)
    assert len(sites) == 2 + 2 * 2 * 2
    assert len(zoo.traced("t5").apply(CIAT(width=3, embedding=False)).edits) == 2 * 2 * 2


def test_count_and_default_widths(bench: Any) -> None:
    """Two adapters a block and one at the embedding: 2 d m + m + d and a norm of 2 d each, m = d / 2."""
    half = D // 2
    one = 2 * D * half + half + D + 2 * D
    assert bench.program.apply(CIAT()).count().trainable == 3 * one
    assert zoo.traced("t5").apply(CIAT()).count().trainable == (2 * (2 + 2) + 2) * one


def test_how_it_starts(bench: Any) -> None:
    p = bench.program.apply(CIAT(width=60, embedding_width=60)).table.trainable
    bound = (6 / (D + 60)) ** 0.5
    for end in ("down_weight", "up_weight"):
        deviation, largest = plain.std_of(p, end)
        assert 0.99 * bound < largest <= bound
        assert deviation == pytest.approx(bound / 3**0.5, rel=0.03)
    tuned = bench.program.apply(CIAT(init="identity"))
    outputs = [zoo.leaves(program.module().eval()(**bench.inputs))[0] for program in (bench.program, tuned)]
    assert torch.equal(*outputs)


def test_it_refuses(bench: Any) -> None:
    for options in ({"width": 0}, {"embedding_width": 0}):
        with pytest.raises(pg.RecipeError, match="ciat: width must be at least 1, got 0"):
            CIAT(**options)
    with pytest.raises(pg.RecipeError, match=r"0\.attention\.q is no sublayer"):
        bench.program.apply(CIAT(at="attention.q"))
    with pytest.raises(pg.NoFold, match="it is nonlinear"):
        pg.fold(bench.program.apply(CIAT()))


@settings(max_examples=30)
@given(
    width=st.none() | st.integers(1, 64),
    embedding=st.booleans(),
    layer_norm=st.booleans(),
    init=st.sampled_from(["xavier_uniform", "identity"]),
)
def test_spec_round_trip(**options: Any) -> None:
    method = CIAT(**options)
    assert pg.parse_pass(str(method)) == method
