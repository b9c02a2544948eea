"""Adapters that were in a model before it was traced: side paths beside a projection, which keeps its role."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from peftgraph.sites import Sites
from tests.support import zoo

Find = Callable[[nn.Module, object], Sites]
D = 12


class Block(nn.Module):
    """A gated feed-forward whose down projection has a path beside it."""

    def __init__(self, rank: int = 2, bent: bool = False, first: bool = False, other: bool = False) -> None:
        super().__init__()
        self.bent, self.first, self.other = bent, first, other
        self.norm = nn.LayerNorm(D)
        self.gate, self.up, self.down = nn.Linear(D, 20), nn.Linear(D, 20), nn.Linear(20, D)
        self.a, self.b = nn.Linear(D if other else 20, rank), nn.Linear(rank, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = self.norm(x)
        hidden = F.silu(self.gate(n)) * self.up(n)
        side = self.a(F.dropout(n if self.other else hidden, 0.1, self.training))
        side = self.b(F.relu(side) if self.bent else side) * 2.0
        y = self.down(hidden)
        return x + (side + y if self.first else y + side)


def roles(sites: Sites) -> dict[str, str]:
    wanted = {"gate", "up", "down", "a", "b"}
    return {site.path: site.role for site in sites if site.path in wanted and site.role != "ffn.hidden"}


@pytest.mark.parametrize("first", [False, True])
def test_a_low_rank_path_is_no_feedforward(find: Find, first: bool) -> None:
    found = roles(find(Block(first=first), (torch.randn(5, 7, D),)))
    ffn = {"gate": "ffn.gate", "up": "ffn.up", "down": "ffn.down"}
    assert found == {**ffn, "a": "side.down", "b": "side.up"}


@pytest.mark.parametrize("near", [{"rank": 24}, {"bent": True}, {"other": True}])
def test_what_is_wide_or_bent_or_reads_something_else_is_no_side_path(find: Find, near: dict[str, Any]) -> None:
    sites = find(Block(**near), (torch.randn(5, 7, D),))
    assert not sites.select("side.down|side.up")


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft's own
@pytest.mark.parametrize(("name", "dora"), [("llama", False), ("gpt2", False), ("llama", True)])
def test_a_model_that_peft_wrapped(name: str, dora: bool) -> None:
    peft = pytest.importorskip("peft")
    import peftgraph as pg

    plain = zoo.traced(name).sites
    options = {"use_dora": True} if dora else {"lora_dropout": 0.1}
    config = peft.LoraConfig(r=2, target_modules="all-linear", fan_in_fan_out=name == "gpt2", **options)
    wrapped = pg.trace(peft.get_peft_model(zoo.build(name), config), zoo.example(name)).sites
    assert essence(wrapped) == essence(plain)
    sides = {role: len(wrapped.select(role)) for role in ("side.down", "side.up")}
    assert sides["side.down"] == sides["side.up"] > 0


def essence(sites: Sites) -> list[tuple[object, ...]]:
    """The sites without paths and norms; DoRA also runs its matrices on an identity, which are projections."""
    kept = [site for site in sites if site.role not in ("side.down", "side.up", "norm", "projection")]
    return [(s.role, s.layer, s.kind, s.columns, s.heads, s.shape, s.layout) for s in kept]
