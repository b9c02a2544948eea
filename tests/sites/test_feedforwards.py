"""Feed-forwards whose result is carried on, handed out to parallel streams, or gated and then convolved."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftgraph.sites import Sites
from peftgraph.sites.assign.periods import cut

Find = Callable[[nn.Module, object], Sites]
D, STREAMS, HEADS = 12, 4, 3


def paths(sites: Sites, selector: str) -> list[str]:
    return [site.path for site in sites.select(selector)]


class Attend(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix, self.o = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.mix(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Feed(nn.Module):
    """up and down; `after`: a projection that carries the result on, behind a norm or behind a nonlinearity."""

    def __init__(self, after: nn.Module | None = None) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, 20), nn.Linear(20, D if after is None else 8)
        self.after, self.last = after, nn.Identity() if after is None else nn.Linear(8, D)

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(F.gelu(self.up(x)))
        return self.last(y if self.after is None else self.after(y))


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(D), inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(self.norm(x))


def test_a_result_may_be_carried_on_by_a_further_projection(find: Find) -> None:
    sites = find(nn.Sequential(Residual(Attend()), Residual(Feed(nn.LayerNorm(8)))), (torch.randn(3, 7, D),))
    assert (paths(sites, "ffn.up"), paths(sites, "ffn.down")) == (["1.inner.up"], ["1.inner.down"])
    assert paths(sites, "projection") == ["1.inner.last"]
    (ffn,) = sites.require("ffn")
    assert ffn.ports["output"] == sites.require("projection")[0].ports["output"]


def test_the_last_of_three_projections_is_down_where_each_is_bent(find: Find) -> None:
    sites = find(nn.Sequential(Residual(Attend()), Residual(Feed(nn.GELU()))), (torch.randn(3, 7, D),))
    assert paths(sites, "ffn.down") == ["1.inner.last"]


class Weights(nn.Module):
    """What each position reads of, writes to and mixes between its parallel streams."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.all = nn.LayerNorm(STREAMS * D), nn.Linear(STREAMS * D, (2 + STREAMS) * STREAMS)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        read, write, mix = self.all(self.norm(x.flatten(2))).split((STREAMS, STREAMS, STREAMS**2), dim=-1)
        return read.sigmoid(), write.sigmoid(), mix.unflatten(-1, (STREAMS, STREAMS)).softmax(-1)


class Hyper(nn.Module):
    """A sublayer between parallel streams; `mixed`: the streams are mixed on the way. `broadcast`: the result is added
    to every position as one, as the gate of a branch would be."""

    def __init__(self, inner: nn.Module, mixed: bool, broadcast: bool) -> None:
        super().__init__()
        self.weights, self.norm, self.inner = Weights(), nn.LayerNorm(D), inner
        self.mixed, self.broadcast = mixed, broadcast

    def forward(self, x: Tensor) -> Tensor:
        read, write, mix = self.weights(x)
        y = self.inner(self.norm((read.unsqueeze(-1) * x).sum(2)))
        y = y.mean(1, keepdim=True).unsqueeze(-2) if self.broadcast else write.unsqueeze(-1) * y.unsqueeze(-2)
        return y + (mix.transpose(-1, -2) @ x if self.mixed else x)


class Streams(nn.Module):
    def __init__(self, mixed: bool, broadcast: bool = False) -> None:
        super().__init__()
        kinds = [Attend, Feed] * 2
        self.layers = nn.ModuleList(Hyper(kind(), mixed, broadcast and kind is Feed) for kind in kinds)

    def forward(self, x: Tensor) -> Tensor:
        y = x.unsqueeze(2).expand(-1, -1, STREAMS, -1)
        for layer in self.layers:
            y = layer(y)
        return y.mean(2)


@pytest.mark.parametrize("mixed", [False, True])
def test_parallel_streams_with_weights_are_one_stream_of_blocks(find: Find, mixed: bool) -> None:
    sites = find(Streams(mixed), (torch.randn(3, 7, D),))
    assert paths(sites, "ffn.up|ffn.down") == [f"layers.{i}.inner.{name}" for i in (1, 3) for name in ("up", "down")]
    assert [site.layer for site in sites.require("attention.q|ffn.down")] == [0, 0, 1, 1]
    assert [site.layout for site in sites.require("attention|ffn")] == ["pre"] * 4
    assert paths(sites, "projection") == [f"layers.{i}.weights.all" for i in range(4)]


def test_a_mean_that_is_added_everywhere_is_not_handed_out(find: Find) -> None:
    sites = find(Streams(mixed=False, broadcast=True), (torch.randn(3, 7, D),))
    assert not sites.select("ffn.down")


class Convolved(nn.Module):
    """A gate, an activation and a depthwise convolution, before (`early`) or after the gate."""

    def __init__(self, early: bool) -> None:
        super().__init__()
        self.early = early
        self.up, self.down = nn.Linear(D, 40), nn.Linear(20, D)
        wide = 40 if early else 20
        self.along = nn.Conv1d(wide, wide, 3, padding=1, groups=wide)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x).transpose(1, 2)
        y = F.glu(self.along(y), dim=1) if self.early else self.along(F.glu(y, dim=1))
        return self.down(F.silu(y.transpose(1, 2)))


def test_a_gate_over_convolved_values_is_a_feed_forward(find: Find) -> None:
    sites = find(nn.Sequential(Residual(Attend()), Residual(Convolved(early=True))), (torch.randn(3, 7, D),))
    assert paths(sites, "ffn.*") == ["1.inner.up", "1.inner.up", "1.inner.down"]


def test_a_convolution_of_gated_values_is_none(find: Find) -> None:
    sites = find(nn.Sequential(Residual(Attend()), Residual(Convolved(early=False))), (torch.randn(3, 7, D),))
    assert not sites.select("ffn.*")
    (miss,) = (miss for miss in sites.misses if miss.role == "ffn.down")
    assert miss.found == "a depthwise convolution of what %glu gates"


@pytest.mark.parametrize(
    ("kinds", "blocks"),
    [
        ("MFMF", [(0, 2), (2, 4)]),
        ("CMXFMXF", [(1, 4), (4, 7)]),
        ("MXFMFMXFMF", [(0, 3), (3, 5), (5, 8), (8, 10)]),  # a cross attention in every second layer
        ("MFXFMFXF", [(0, 2), (2, 4), (4, 6), (6, 8)]),  # in place of a self attention
        ("XFXF", [(0, 2), (2, 4)]),
        ("MF", [(0, 2)]),
        ("PPP", [(0, 1), (1, 2), (2, 3)]),
    ],
)
def test_sublayers_are_cut_by_their_period(kinds: str, blocks: list[tuple[int, int]]) -> None:
    assert cut(kinds) == blocks
