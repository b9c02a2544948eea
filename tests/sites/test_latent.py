"""Multi-head latent attention: q, k and v through compressed projections, and a rotary part that all heads share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from peftgraph.sites import Columns, Sites

Find = Callable[[nn.Module, object], Sites]
D, H, NOPE, ROPE, V, LATENT = 12, 3, 4, 2, 5, 6


class Latent(nn.Module):
    """q = B_q(N(A_q x)); k = [B_k(N(c)); r] with [c; r] = A_kv x, the rotary part r shared by the heads; v = B_v(N(c)).

    `filled`: the keys are written into an empty tensor instead of being concatenated. `apart`: another attention
    reads the compressed queries and the values too.
    """

    def __init__(self, filled: bool = False, apart: bool = False) -> None:
        super().__init__()
        self.filled, self.apart = filled, apart
        self.norm = nn.LayerNorm(D)
        self.a_q, self.a_kv = nn.Linear(D, 7), nn.Linear(D, LATENT + ROPE)
        self.n_q, self.n_kv = nn.LayerNorm(7), nn.LayerNorm(LATENT)
        self.b_q, self.b_kv = nn.Linear(7, H * (NOPE + ROPE)), nn.Linear(LATENT, H * (NOPE + V))
        self.o = nn.Linear(H * V, D)

    def rotated(self, x: torch.Tensor) -> torch.Tensor:
        angle = torch.arange(x.shape[-2], device=x.device)[:, None] * 0.1
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.cat((even * angle.cos() - odd * angle.sin(), odd * angle.cos() + even * angle.sin()), -1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        latent = self.n_q(self.a_q(h))
        q = self.b_q(latent).unflatten(-1, (H, NOPE + ROPE)).transpose(1, 2)
        c, shared = self.a_kv(h).split([LATENT, ROPE], dim=-1)
        kv = self.b_kv(self.n_kv(c)).unflatten(-1, (H, NOPE + V)).transpose(1, 2)
        k, v = kv.split([NOPE, V], dim=-1)
        shared = self.rotated(shared[:, None]).expand(-1, H, -1, -1)
        if self.filled:
            whole = k.new_empty(*k.shape[:-1], NOPE + ROPE)
            whole[..., :NOPE], whole[..., NOPE:] = k, shared
        else:
            whole = torch.cat((k, shared), -1)
        q = torch.cat((q[..., :NOPE], self.rotated(q[..., NOPE:])), -1)
        mixed = F.scaled_dot_product_attention(q, whole, v)
        if self.apart:
            other = self.b_q(latent).unflatten(-1, (H, NOPE + ROPE)).transpose(1, 2)
            mixed = mixed + F.scaled_dot_product_attention(other, other, v)
        return x + self.o(mixed.transpose(1, 2).flatten(2))


def per_head(start: int, stop: int) -> Columns:
    return Columns(tuple((head * (NOPE + V) + start, head * (NOPE + V) + stop) for head in range(H)))


@pytest.mark.parametrize("filled", [False, True])
def test_every_feature_has_its_role(find: Find, filled: bool) -> None:
    sites = find(Latent(filled), (torch.randn(5, 7, D),))
    found = {(site.role, site.path): site.columns for site in sites if site.role.startswith("attention.")}
    assert found == {
        ("attention.latent", "a_q"): None,
        ("attention.q", "b_q"): None,
        ("attention.latent", "a_kv"): Columns(((0, LATENT),)),
        ("attention.k", "a_kv"): Columns(((LATENT, LATENT + ROPE),)),
        ("attention.k", "b_kv"): per_head(0, NOPE),
        ("attention.v", "b_kv"): per_head(NOPE, NOPE + V),
        ("attention.o", "o"): None,
        ("attention.core", ""): None,
    }
    assert {site.kind for site in sites.select("attention.q|attention.k")} == {"self"}
    assert not sites.select("projection")


def test_what_two_attentions_read_is_no_latent(find: Find) -> None:
    sites = find(Latent(apart=True), (torch.randn(5, 7, D),))
    assert not sites.select("attention.latent")
    assert len(sites.select("attention.q")) == 2
