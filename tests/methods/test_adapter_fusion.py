"""AdapterFusion: two stages, what trains, what is saved; its values and gradients stand in tests/references."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo

import peftgraph as pg
from peftgraph.passes import AdapterFusion, Pfeiffer

F64 = torch.float64
FUSION = AdapterFusion(adapters=("a", "b"), width=5)


def stages(program: pg.Program) -> dict[str, pg.Program]:
    return {name: zoo.randomise(program.apply(Pfeiffer(width=5)), 0.3) for name in FUSION.adapters}


@pytest.mark.parametrize("name", zoo.NAMES)
def test_equal_adapters_and_an_identity_give_one_adapter(name: str) -> None:
    """Whatever the mixture of two equal adapters is, it is that adapter; V is off the identity by 1e-6."""
    base, inputs = zoo.traced(name, dtype=F64), zoo.example(name, dtype=F64)
    one = zoo.randomise(base.apply(Pfeiffer(width=5)), 0.3)
    fused = FUSION.take(base.apply(FUSION), {"a": one, "b": one})
    ours, theirs = (zoo.leaves(p.module().eval()(**inputs))[0].detach() for p in (fused, one))
    assert 0 < float((ours - theirs).abs().max()) < 1e-3 * float(theirs.abs().max())


def test_only_the_attention_trains_and_everything_is_saved(bench: Any, tmp_path: Any) -> None:
    fused = FUSION.take(bench.program.apply(FUSION), stages(bench.program))
    leaves = {name.rpartition(".")[2] for name in fused.table.trainable}
    assert leaves == {"query_weight", "query_bias", "key_weight", "key_bias", "value_weight"}
    assert fused.count().trainable == 3 * zoo.WIDTH**2 + 2 * zoo.WIDTH
    loaded = bench.program.load_adapter(fused.save_adapter(tmp_path / "fused"))
    assert loaded.table.hashes() == fused.table.hashes()
    assert fused.remove().table.hashes() == bench.program.table.hashes()
    assert fused.remove().text() == bench.program.text()


def test_the_regulariser_is_zero_at_the_identity(bench: Any) -> None:
    fused = bench.program.apply(FUSION)
    d = zoo.WIDTH
    assert float(FUSION.regulariser(fused).detach()) == pytest.approx(0.01 * d * (d - 1) * 1e-12, rel=1e-6)
    (value,) = (p for name, p in fused.table.trainable.items() if name.endswith("value_weight"))
    with torch.no_grad():
        value.copy_(torch.eye(d, dtype=F64)).diagonal().add_(2.0)
    assert float(FUSION.regulariser(fused).detach()) == pytest.approx(0.01 * 4 * d)


def test_it_refuses(bench: Any) -> None:
    for names, message in ((("a",), "at least two adapters, got 1"), (("a", "a"), "a name of its own"),
                           (("a", "b c"), "names must be identifiers")):  # fmt: skip
        with pytest.raises(pg.RecipeError, match=message):
            AdapterFusion(adapters=names)
    fused = bench.program.apply(FUSION)
    with pytest.raises(pg.RecipeError, match=r"it mixes \['a', 'b'\], got \['a'\]"):
        FUSION.take(fused, {"a": bench.program})
    with pytest.raises(pg.RecipeError, match=r"a has no stack\.0\.ffn_pfeiffer\.down_weight of shape \(5, 48\)"):
        FUSION.take(fused, {"a": bench.program, "b": bench.program})
    with pytest.raises(pg.NoFold, match="its mixture depends on the input"):
        pg.fold(fused)


def test_spec_round_trip() -> None:
    method = AdapterFusion(adapters=("x", "y", "z"), width=3, dropout=0.1, value=False, name="f")
    assert pg.parse_pass(str(method)) == method
