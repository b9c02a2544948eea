"""Gates of an attention's result: found in every spelling, adapted, folded and explained as any projection is."""

from __future__ import annotations

import pytest
import torch
from gated_attention import HEADS, SIZE, WIDTH, GatedAttention
from torch import nn

import peftgraph as pg
from peftgraph.passes import LoRA


@pytest.fixture(scope="module", params=["features", "heads", "fused"])
def program(request: pytest.FixtureRequest) -> pg.Program:
    eager = request.param == "features"
    model = nn.Sequential(GatedAttention(request.param, eager), GatedAttention(request.param, eager)).double().eval()
    return pg.trace(model, torch.randn(2, 5, WIDTH, dtype=torch.float64))


def test_the_gate_is_a_part_of_its_layer(program: pg.Program) -> None:
    gates = program.sites.select(pg.attention.gate)
    assert [(site.layer, site.kind) for site in gates] == [(0, "self"), (1, "self")]
    assert set(gates) <= set(program.sites.select("attention.*")) & set(program.sites.select(pg.linear))
    q = program.sites.select("attention.q&layer(0)")[0]
    if q.path == gates[0].path:  # one stored weight: each owns its own columns, head by head
        assert str(q.columns) == "0:4,8:12,16:20,..."
        assert str(gates[0].columns) == "4:8,12:16,20:24,..."


def test_the_gate_is_explained_and_named(program: pg.Program) -> None:
    text = str(program.sites.explain(pg.attention.gate, layer=0))
    assert "multiplies the result of the attention, %0.attention.core, by %0." in text
    assert "scaled_dot_product_attention" not in text.split("leads back")[1].split("\n")[0]
    assert "gate" in program.text()


def test_an_adapter_at_the_gate_alone_changes_the_outputs_and_folds(program: pg.Program) -> None:
    tuned = program.apply(LoRA(at=pg.attention.gate, rank=2))
    net = tuned.module()
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
            assert "gate" in name or ".q" in name
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    changed = (net(x) - program.module()(x)).abs().max()
    assert changed > 1e-3
    torch.testing.assert_close(pg.fold(tuned).module()(x), net(x))


def test_what_is_no_gate_is_none() -> None:
    class Scaled(GatedAttention):
        def forward(self, x: torch.Tensor) -> torch.Tensor:  # a learned vector, and a value without a nonlinearity
            q, k, v = (
                one(self.norm(x)).unflatten(-1, (HEADS, SIZE)).transpose(1, 2) for one in (self.q, self.k, self.v)
            )
            y = self._attend(q, k, v).transpose(1, 2).flatten(2)
            return x + self.o(y * self.norm.weight.sigmoid() * self.gate(x))

    program = pg.trace(Scaled("features", False).eval(), torch.randn(2, 5, WIDTH))
    assert not program.sites.select(pg.attention.gate)
    with pytest.raises(pg.NoMatch, match="nonlinearity between them and the product"):
        program.sites.require("attention.gate")
