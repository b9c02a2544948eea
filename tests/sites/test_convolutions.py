"""Depthwise convolutions leave features where they are; other convolutions, and MLPs over positions, do not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftgraph.sites import Columns, Sites

Find = Callable[[nn.Module, object], Sites]
D, H, SIDE = 12, 3, 4


def missed(sites: Sites, role: str) -> str:
    """What stands where a role was looked for."""
    (miss,) = (miss for miss in sites.misses if miss.role == role)
    return miss.found


def pixels() -> tuple[Tensor]:
    return (torch.randn(5, SIDE * SIDE, D),)


class Local(nn.Module):
    """One linear for q, k and v and a convolution over positions behind it, then a feed-forward with one inside."""

    def __init__(self, groups: int, attends: bool = True) -> None:
        super().__init__()
        self.attends = attends
        self.first, self.second = nn.LayerNorm(D), nn.LayerNorm(D)
        self.qkv, self.o = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.spread = nn.Conv2d(3 * D, 3 * D, 3, padding=1, groups=3 * D // groups)
        self.up, self.down = nn.Linear(D, 24), nn.Linear(24, D)
        self.inside = nn.Conv2d(24, 24, 3, padding=1, groups=24 // groups)

    def along(self, conv: nn.Module, x: Tensor) -> Tensor:
        return conv(x.transpose(1, 2).unflatten(2, (SIDE, SIDE))).flatten(2).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.attends:
            q, k, v = self.along(self.spread, self.qkv(self.first(x))).unflatten(-1, (3, H, -1)).permute(2, 0, 3, 1, 4)
            x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.along(self.inside, self.up(self.second(x)))))


def test_depthwise_convolutions_pass_features_on(find: Find) -> None:
    sites = find(Local(groups=1), pixels())
    for i, role in enumerate("qkv"):
        (site,) = sites.require(f"attention.{role}")
        assert (site.path, site.heads, site.columns) == ("qkv", H, Columns(((D * i, D * i + D),)))
    assert [site.path for site in sites.require("ffn.up|ffn.down")] == ["up", "down"]
    assert [site.layout for site in sites.require("attention|ffn")] == ["pre", "pre"]


def test_convolutions_that_mix_features_do_not(find: Find) -> None:
    sites = find(Local(groups=2), pixels())
    assert missed(sites, "attention.q") == "%conv2d behind q, %getitem"
    assert missed(sites, "ffn.down") == "%conv2d_1 (conv2d)"


class Mixer(nn.Module):
    """An MLP over positions (`over` = 1) or over features (`over` = 2)."""

    def __init__(self, over: int, normed: bool = True) -> None:
        super().__init__()
        self.over, size = over, (SIDE * SIDE, D)[over - 1]
        self.norm = nn.LayerNorm(D) if normed else nn.Identity()
        self.up, self.down = nn.Linear(size, 10), nn.Linear(10, size)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.down(F.gelu(self.up(y.transpose(self.over, 2)))).transpose(self.over, 2)


def test_an_mlp_over_positions_is_no_feed_forward(find: Find) -> None:
    sites = find(nn.Sequential(Mixer(1), Mixer(2), Mixer(1), Mixer(2)), pixels())
    assert [(site.path, site.layer) for site in sites.require("ffn.up")] == [("1.up", 0), ("3.up", 1)]
    assert missed(find(Mixer(1), pixels()), "ffn.down") == "%linear before it, which contracts positions, not features"


class Gate(nn.Module):
    """A bottleneck with a depthwise convolution: a feed-forward on a stream that carries attention, else none."""

    def __init__(self, attends: bool) -> None:
        super().__init__()
        self.block = Local(1, attends)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


@pytest.mark.parametrize("attends", [True, False])
def test_a_depthwise_bottleneck_feeds_a_stream_only_beside_attention(find: Find, attends: bool) -> None:
    sites = find(Gate(attends), pixels())
    assert [site.path for site in sites.select("ffn.down")] == (["block.down"] if attends else [])
    if not attends:
        found = missed(sites, "ffn.down")
        assert found == "a depthwise convolution inside it, and no attention on its stream"
