"""Adapter+: behind the residual sum or the norm, the scale of each feature, whole examples that go without."""

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
from peftgraph.passes import AdapterPlus

D, F64 = zoo.WIDTH, torch.float64


class Scaled(nn.Module):
    """s + d c * (W_up act(W_down s + b_down) + b_up), with d one of 0 and 1 / (1 - p) for each example in training."""

    def __init__(self, width: int, drop_path: float = 0.0, dropout: float = 0.0) -> None:
        super().__init__()
        self.bottleneck = plain.Bottleneck(width, "gelu", dropout)
        self.scale, self.drop = nn.Parameter(torch.ones(D, dtype=F64)), nn.Dropout(drop_path)

    def forward(self, s: Tensor) -> Tensor:
        delta = self.scale * self.bottleneck(s)
        return s + (delta * self.drop(torch.ones(len(s), 1, 1, dtype=F64)) if self.drop.p else delta)

    def named(self, owner: str) -> dict[str, Tensor]:
        return plain.pairs({owner: self.bottleneck}) | {f"{owner}.scale": self.scale}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("site", ["attention", "ffn"])
def test_equation_in_a_pre_norm_block(bench: Any, site: str, training: bool) -> None:
    method = AdapterPlus(at=site, width=5, drop_path=0.4, dropout=0.2)
    tuned = zoo.randomise(bench.program.apply(method), 0.2)
    reference = bench.plain()
    adapter = reference.stack[0].adapter = Scaled(5, 0.4, 0.2)
    plain.rewrite(reference.stack[0], total=lambda where, s, *_: adapter(s) if where == site else s)
    bench.agree(tuned, reference, adapter.named(f"stack.0.{site}_adapter_plus"), training)


def test_equation_in_a_post_norm_block(bench: Any) -> None:
    """It reads what the norm gives, and so does the next block what it gives."""
    tuned = zoo.randomise(zoo.traced("bert", dtype=F64).apply(AdapterPlus(width=5)), 0.2)
    reference = zoo.build("bert", dtype=F64).requires_grad_(False)
    same: dict[str, Tensor] = {}
    for i, layer in enumerate(reference.encoder.layer):
        adapter, norm = Scaled(5), layer.output.LayerNorm.forward
        layer.output.adapter = adapter
        layer.output.LayerNorm.forward = lambda s, adapter=adapter, norm=norm: adapter(norm(s))
        same |= adapter.named(f"encoder.layer.{i}.ffn_adapter_plus")
    type(bench)(bench.program, zoo.example("bert")).agree(tuned, reference, same, False)


def test_an_example_has_the_adapter_or_goes_without() -> None:
    """Over many draws each example's answer is the base's or that of twice the adapter, and eval has it once."""
    base, inputs = zoo.traced("clip_vision", dtype=F64), zoo.example("clip_vision")
    tuned, twice = (base.apply(AdapterPlus(at="ffn&layers(1)", width=5, drop_path=0.5)) for _ in range(2))
    zoo.randomise(tuned, 0.2)
    with torch.no_grad():
        for name, parameter in twice.table.trainable.items():
            parameter.copy_(tuned.table[name].tensor * (2 if name.endswith("scale") else 1))
        ends = [zoo.leaves(program.module().eval()(**inputs))[0] for program in (base, twice)]
        module, seen = tuned.module().train(), set[int]()
        for seed in range(12):
            torch.manual_seed(seed)
            for one, *known in zip(zoo.leaves(module(**inputs))[0], *ends, strict=True):
                found = [number for number, answer in enumerate(known) if torch.allclose(one, answer)]
                assert len(found) == 1
                seen.update(found)
        assert not torch.allclose(zoo.leaves(module.eval()(**inputs))[0], ends[1])
    assert seen == {0, 1}


def test_how_it_starts_and_how_large_it_is(bench: Any) -> None:
    tuned = bench.program.apply(AdapterPlus(width=60))
    p = tuned.table.trainable
    for side in ("down_weight", "up_weight"):
        std, largest = plain.std_of(p, side)
        assert std == pytest.approx(0.0088, rel=0.05)  # of a normal with std 0.01, cut at two of them
        assert largest <= 0.02
    assert all(torch.equal(value, torch.ones(D, dtype=F64)) for name, value in p.items() if name.endswith("scale"))
    assert tuned.count().trainable == 2 * D * 60 + 60 + 2 * D
    p = bench.program.apply(AdapterPlus(width=6, init="identity")).table.trainable
    assert plain.std_of(p, "up_weight")[1] == 0


def test_it_refuses(bench: Any) -> None:
    with pytest.raises(pg.RecipeError, match="0.attention and 0.ffn end in one residual sum"):
        zoo.traced("gpt_neox").apply(AdapterPlus(at="attention|ffn", width=3))
    with pytest.raises(pg.RecipeError, match=r"0\.ffn\.up is no sublayer with a residual add"):
        bench.program.apply(AdapterPlus(at="ffn.up"))
    with pytest.raises(pg.RecipeError, match=r"drop_path must lie in \[0, 1\), got 1"):
        AdapterPlus(drop_path=1)
    with pytest.raises(pg.NoFold, match="it is nonlinear, so no weight can express it"):
        pg.fold(bench.program.apply(AdapterPlus(width=2)))


@settings(max_examples=20)
@given(width=st.integers(1, 512), drop_path=st.floats(0, 1, exclude_max=True), name=st.sampled_from(["", "a"]))
def test_spec_round_trip(**options: Any) -> None:
    method = AdapterPlus(**options)
    assert pg.parse_pass(str(method)) == method
