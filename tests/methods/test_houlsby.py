"""Houlsby adapters: both places around the dropout, the norms that train, how they start."""

from __future__ import annotations

from typing import Any

import plain
import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st

import peftgraph as pg
from peftgraph.authoring import ACTIVATIONS
from peftgraph.passes import BitFit, Houlsby

F64 = torch.float64
OWNERS = {site: f"stack.0.{site}_houlsby" for site in ("attention", "ffn")}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(("place", "where"), [("after_dropout", "branch"), ("before_dropout", "undropped")])
def test_equation_around_the_dropout(bench: Any, place: str, where: str, training: bool) -> None:
    tuned = zoo.randomise(bench.program.apply(Houlsby(width=5, dropout=0.2, place=place)), 0.2)
    reference = bench.plain()
    block = reference.stack[0]
    adapters = {site: plain.Bottleneck(5, "gelu", 0.2) for site in OWNERS}
    block.adapters = torch.nn.ModuleDict(adapters)
    plain.rewrite(block, **{where: lambda site, h, *_: h + adapters[site](h)})
    same = plain.pairs({OWNERS[site]: adapter for site, adapter in adapters.items()})
    bench.agree(tuned, reference, same | plain.norms(reference), training)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_equation_in_a_post_norm_block(bench: Any, training: bool) -> None:
    """y = LN(x + A(drop(F(x)))), and BERT's embedding norm trains too."""
    tuned = zoo.randomise(zoo.traced("bert", dtype=F64).apply(Houlsby(width=5)), 0.2)
    reference = zoo.build("bert", dtype=F64).requires_grad_(False)
    places: dict[str, plain.Bottleneck] = {}
    for i, layer in enumerate(reference.encoder.layer):
        for role, output in (("attention.attention", layer.attention.output), ("ffn", layer.output)):
            adapter = places[f"encoder.layer.{i}.{role}_houlsby"] = plain.Bottleneck(5, "gelu")
            output.adapter = adapter
            output.dropout.register_forward_hook(lambda _m, _a, h, adapter=adapter: h + adapter(h))
    same = plain.pairs(places) | plain.norms(reference)
    type(bench)(bench.program, zoo.example("bert")).agree(tuned, reference, same, training)


@pytest.mark.parametrize(("init", "std"), [("paper", 1e-2), ("code", 1e-3)])
def test_how_it_starts(bench: Any, init: str, std: float) -> None:
    p = bench.program.apply(Houlsby(width=60, init=init)).table.trainable
    for end in ("down_weight", "up_weight"):
        deviation, largest = plain.std_of(p, end)
        assert deviation == pytest.approx(0.8796 * std, rel=0.05)  # of a normal truncated at two deviations
        assert 1.9 * std < largest <= 2 * std
    assert plain.std_of(p, "down_bias")[1] == plain.std_of(p, "up_bias")[1] == 0


def test_which_norms_train() -> None:
    base = zoo.traced("bert", dtype=F64)
    with_norms, without = (base.apply(Houlsby(width=3, norms=norms)) for norms in (True, False))
    more = set(with_norms.table.trainable) - set(without.table.trainable)
    assert more == {f"{site.path}.{part}" for site in base.sites.select("norm") for part in ("weight", "bias")}
    assert len(more) == 2 * (2 * 2 + 1)
    assert with_norms.count().changed == len(more) * zoo.WIDTH


def test_two_adapters_in_a_decoders_block() -> None:
    sites = {edit.site for edit in zoo.traced("t5").apply(Houlsby(width=3, norms=False)).edits}
    assert sites == {f"{stack}.{i}.{site}" for stack in ("encoder", "decoder") for i in (0, 1)
                     for site in ("attention", "ffn")}  # fmt: skip


def test_it_refuses(bench: Any) -> None:
    with pytest.raises(pg.RecipeError) as caught:
        bench.program.apply(Houlsby(at="attention.q"))
    wanted = "houlsby: 0.attention.q is no sublayer with a residual add; choose attention, ffn or both."
    assert str(caught.value) == wanted
    with pytest.raises(pg.RecipeError, match='houlsby: init must be "paper" or "code", got \'tf\''):
        Houlsby(init="tf")  # pyright: ignore[reportArgumentType]
    with pytest.raises(pg.RecipeError, match='place must be "after_dropout" or "before_dropout"'):
        Houlsby(place="here")  # pyright: ignore[reportArgumentType]
    with pytest.raises(pg.Conflict, match=r"both train stack\.0\.n1\.bias"):
        bench.program.apply(BitFit(), Houlsby())
    with pytest.raises(pg.NoFold, match="it is nonlinear"):
        pg.fold(bench.program.apply(Houlsby(width=3)))


@settings(max_examples=30)
@given(
    width=st.integers(1, 512),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    init=st.sampled_from(["paper", "code"]),
    place=st.sampled_from(["after_dropout", "before_dropout"]),
    norms=st.booleans(),
    name=st.sampled_from(["", "a"]),
)
def test_spec_round_trip(**options: Any) -> None:
    method = Houlsby(**options)
    assert pg.parse_pass(str(method)) == method
