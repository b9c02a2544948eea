"""The parallel adapter: what it reads, where it enters, its scale, how it starts."""

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
from peftgraph.passes import ParallelAdapter

F64 = torch.float64


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("reads", ["normed", "residual"])
@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
def test_equation(bench: Any, reads: str, learned: bool, training: bool) -> None:
    """h + s B(x), after the dropout on h, at attention and at the feed-forward."""
    method = ParallelAdapter(at="attention|ffn", width=5, scale=2.5, learned=learned, input=reads, dropout=0.2)
    tuned = zoo.randomise(bench.program.apply(method), 0.2)
    reference = bench.plain()
    block = reference.stack[0]
    adapters = {site: plain.Bottleneck(5, "relu", 0.2) for site in ("attention", "ffn")}
    block.adapters = nn.ModuleDict(adapters)
    scales = {site: nn.Parameter(torch.full((1,), 2.5, dtype=F64)) for site in adapters}
    if learned:
        block.scales = nn.ParameterDict(scales)

    def branch(site: str, h: Tensor, read: Tensor, stream: Tensor) -> Tensor:
        scale = scales[site] if learned else 2.5
        return h + scale * adapters[site](read if reads == "normed" else stream)

    plain.rewrite(block, branch=branch)
    owners = {site: f"stack.0.{site}_parallel_adapter" for site in adapters}
    same = plain.pairs({owners[site]: adapter for site, adapter in adapters.items()})
    same |= {f"{owners[site]}.scale": scale for site, scale in scales.items() if learned}
    bench.agree(tuned, reference, same, training)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_the_authors_attention_form(bench: Any, training: bool) -> None:
    """The bottleneck of a norm of x is added to the heads before the output projection."""
    method = ParallelAdapter(at="attention.o", width=5, scale=1.0, layer_norm=True)
    tuned = zoo.randomise(bench.program.apply(method), 0.2)
    reference = bench.plain()
    block = reference.stack[0]
    adapter, norm = block.adapter, block.norm = plain.Bottleneck(5, "relu"), nn.LayerNorm(zoo.WIDTH).double()
    plain.rewrite(block, heads=lambda _, heads, read, __: heads + adapter(norm(read)))
    same = plain.pairs({"stack.0.out": adapter})
    same |= {f"stack.0.out.norm_{part}": getattr(norm, part) for part in ("weight", "bias")}
    bench.agree(tuned, reference, same, training)


def test_heads_may_be_narrower_than_the_stream() -> None:
    """Llama's output projection reads 48 features; T5's cross-attention has a layer of its own."""
    tuned = zoo.traced("t5").apply(ParallelAdapter(at="attention.o", width=3))
    shapes = {tuple(p.shape) for name, p in tuned.table.trainable.items() if name.endswith("up_weight")}
    assert shapes == {(48, 3)}
    assert len(tuned.edits) == 2 + 2 * 2


def test_both_inputs_are_one_in_a_post_norm_block() -> None:
    base, inputs = zoo.traced("bert", dtype=F64), zoo.example("bert")
    outputs = []
    for reads in ("normed", "residual"):
        torch.manual_seed(5)
        tuned = base.apply(ParallelAdapter(width=3, input=reads, init="bert"))
        outputs.append(zoo.leaves(tuned.module().eval()(**inputs))[0])
    assert torch.equal(*outputs)


def test_how_it_starts(bench: Any) -> None:
    p = bench.program.apply(ParallelAdapter(width=60)).table.trainable
    assert plain.std_of(p, "down_weight")[1] <= zoo.WIDTH**-0.5
    assert plain.std_of(p, "down_weight")[0] == pytest.approx((zoo.WIDTH * 3) ** -0.5, rel=0.05)
    assert plain.std_of(p, "up_weight")[1] == plain.std_of(p, "_bias")[1] == 0
    p = bench.program.apply(ParallelAdapter(width=60, init="bert", learned=True)).table.trainable
    assert plain.std_of(p, "up_weight")[0] == pytest.approx(0.02, rel=0.05)
    assert p["stack.0.ffn_parallel_adapter.scale"].tolist() == [4.0]


def test_it_refuses(bench: Any) -> None:
    with pytest.raises(pg.RecipeError, match=r"0\.ffn\.down is no sublayer with a residual add"):
        bench.program.apply(ParallelAdapter(at="ffn.down"))
    with pytest.raises(pg.RecipeError, match='input must be "normed" or "residual", got \'raw\''):
        ParallelAdapter(input="raw")  # pyright: ignore[reportArgumentType]
    with pytest.raises(pg.RecipeError, match="width must be at least 1"):
        ParallelAdapter(width=0)


@settings(max_examples=30)
@given(
    at=st.sampled_from(["ffn", "attention.o", "attention|ffn"]),
    width=st.integers(1, 512),
    scale=st.floats(-10, 10),
    learned=st.booleans(),
    layer_norm=st.booleans(),
    input=st.sampled_from(["normed", "residual"]),
    init=st.sampled_from(["lora", "bert"]),
)
def test_spec_round_trip(**options: Any) -> None:
    method = ParallelAdapter(**options)
    assert pg.parse_pass(str(method)) == method
