"""Attention whose keys and values partly, or wholly, come from earlier calls."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftgraph.sites import Sites

Find = Callable[[nn.Module, object], Sites]
D, H = 12, 3


def heads(value: Tensor) -> Tensor:
    return value.unflatten(-1, (H, -1)).transpose(1, 2)


class Decoder(nn.Module):
    """Self-attention behind a cache of past keys and values; cross-attention that projects its memory, or whose
    keys and values are all cached."""

    def __init__(self, cached: bool) -> None:
        super().__init__()
        self.cached = cached
        self.q, self.k, self.v, self.o = (nn.Linear(D, D) for _ in range(4))
        self.cq, self.ck, self.cv, self.co = (nn.Linear(D, D) for _ in range(4))
        self.up, self.down = nn.Linear(D, 20), nn.Linear(20, D)

    def forward(self, x: Tensor, past_k: Tensor, past_v: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        k, v = torch.cat((past_k, heads(self.k(x))), 2), torch.cat((past_v, heads(self.v(x))), 2)
        mixed = F.scaled_dot_product_attention(heads(self.q(x)), k, v)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        if self.cached:
            mixed = F.scaled_dot_product_attention(heads(self.cq(x)), past_k, past_v)
        else:
            mixed = F.scaled_dot_product_attention(heads(self.cq(x)), heads(self.ck(memory)), heads(self.cv(memory)))
        x = x + self.co(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(x))), k, v


def example() -> tuple[Tensor, ...]:
    past = torch.randn(5, H, 11, D // H)
    return torch.randn(5, 7, D), past, past + 1, torch.randn(5, 13, D)


def roles(sites: Sites, kind: str) -> list[tuple[str, str, int | None]]:
    found = sites.select(f'attention.*&kind("{kind}")')
    return [(site.role, site.path, site.layer) for site in found]


def test_new_keys_behind_cached_ones(find: Find) -> None:
    sites = find(Decoder(cached=False), example())
    assert roles(sites, "self") == [(f"attention.{role}", role, 0) for role in ("k", "v", "q", "o")]
    assert roles(sites, "cross") == [(f"attention.{role}", f"c{role}", 0) for role in ("q", "k", "v", "o")]
    assert [site.columns for site in sites.select("attention.k")] == [None, None]


def test_keys_that_are_all_cached_have_no_projection(find: Find) -> None:
    sites = find(Decoder(cached=True), example())
    assert [path for _, path, _ in roles(sites, "self")] == ["k", "v", "q", "o"]
    assert roles(sites, "cross") == [("attention.q", "cq", 0), ("attention.o", "co", 0)]
    misses = [miss for miss in sites.misses if miss.role in ("attention.k", "attention.v")]
    assert [miss.role for miss in misses] == ["attention.k", "attention.v"]
    assert not [site for site in sites.select("projection") if site.path in ("cq", "co")]
