"""The Pfeiffer adapter: the residual sum, the norm that is used twice, and blocks with one sum for two sublayers."""

from __future__ import annotations

from typing import Any

import plain
import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st

import peftgraph as pg
from peftgraph.passes import Pfeiffer

F64 = torch.float64


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("site", ["attention", "ffn"])
def test_equation_in_a_pre_norm_block(bench: Any, site: str, training: bool) -> None:
    """s + A(s): nothing norms what the adapter reads."""
    tuned = zoo.randomise(bench.program.apply(Pfeiffer(at=site, width=5, dropout=0.2)), 0.2)
    reference = bench.plain()
    adapter = reference.stack[0].adapter = plain.Bottleneck(5, "relu", 0.2)
    plain.rewrite(reference.stack[0], total=lambda where, s, *_: s + adapter(s) if where == site else s)
    bench.agree(tuned, reference, plain.pairs({f"stack.0.{site}_pfeiffer": adapter}), training)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(("at", "role"), [("ffn", "ffn"), ("attention", "attention.attention")])
def test_equation_in_a_post_norm_block(bench: Any, at: str, role: str, training: bool) -> None:
    """LN(s + A(LN(s))), with one LN."""
    tuned = zoo.randomise(zoo.traced("bert", dtype=F64).apply(Pfeiffer(at=at, width=5)), 0.2)
    reference = zoo.build("bert", dtype=F64).requires_grad_(False)
    places: dict[str, plain.Bottleneck] = {}
    for i, layer in enumerate(reference.encoder.layer):
        output = layer.output if at == "ffn" else layer.attention.output
        adapter = places[f"encoder.layer.{i}.{role}_pfeiffer"] = plain.Bottleneck(5, "relu")
        output.adapter, norm = adapter, output.LayerNorm.forward
        output.LayerNorm.forward = lambda s, adapter=adapter, norm=norm: norm(s + adapter(norm(s)))
    type(bench)(bench.program, zoo.example("bert")).agree(tuned, reference, plain.pairs(places), training)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_a_second_one_stands_on_the_first(bench: Any, training: bool) -> None:
    tuned = zoo.randomise(bench.program.apply(Pfeiffer(width=5, name="a"), Pfeiffer(width=4, name="b")), 0.2)
    reference = bench.plain()
    block = reference.stack[0]
    first, second = block.first, block.second = plain.Bottleneck(5, "relu"), plain.Bottleneck(4, "relu")
    plain.rewrite(block, total=lambda site, s, *_: (t := s + first(s)) + second(t) if site == "ffn" else s)
    same = {"stack.0.ffn_pfeiffer.a": first, "stack.0.ffn_pfeiffer.b": second}
    bench.agree(tuned, reference, plain.pairs(same), training)


def test_how_it_starts(bench: Any) -> None:
    p = bench.program.apply(Pfeiffer(width=60)).table.trainable
    assert plain.std_of(p, "down_weight")[0] == pytest.approx(0.02, rel=0.05)
    assert plain.std_of(p, "up_weight")[0] == pytest.approx(0.02, rel=0.05)
    p = bench.program.apply(Pfeiffer(width=60, init="identity")).table.trainable
    assert plain.std_of(p, "up_weight")[1] == plain.std_of(p, "_bias")[1] == 0


def test_parallel_sublayers_share_one_sum() -> None:
    base = zoo.traced("gpt_neox")
    assert len(base.apply(Pfeiffer(width=3)).edits) == 2
    assert len(base.apply(Pfeiffer(at="attention", width=3)).edits) == 2
    with pytest.raises(pg.RecipeError) as caught:
        base.apply(Pfeiffer(at="attention|ffn", width=3))
    wanted = "pfeiffer: 0.attention and 0.ffn end in one residual sum; choose one of them for the adapter."
    assert str(caught.value) == wanted
    assert len(zoo.traced("nano").apply(Pfeiffer(at="attention|ffn", width=3)).edits) == 4


def test_norms_stay_frozen_and_no_parameter_is_added_for_the_second_use() -> None:
    tuned = zoo.traced("bert").apply(Pfeiffer(width=3))
    assert tuned.count().changed == 0
    assert len(tuned.table.trainable) == 2 * 4
    assert tuned.text().count("layer_norm(") == zoo.traced("bert").text().count("layer_norm(") + 2


def test_it_refuses(bench: Any) -> None:
    with pytest.raises(pg.RecipeError, match=r"0\.ffn\.up is no sublayer with a residual add"):
        bench.program.apply(Pfeiffer(at="ffn.up"))
    with pytest.raises(pg.RecipeError, match='init must be "bert" or "identity"'):
        Pfeiffer(init="zero")  # pyright: ignore[reportArgumentType]


@settings(max_examples=30)
@given(width=st.integers(1, 512), init=st.sampled_from(["bert", "identity"]), name=st.sampled_from(["", "a"]))
def test_spec_round_trip(**options: Any) -> None:
    method = Pfeiffer(**options)
    assert pg.parse_pass(str(method)) == method
