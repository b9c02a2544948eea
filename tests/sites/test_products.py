"""Attention in other products than softmax(q k^T) v by head: mixed heads, shared keys, no softmax, features weighed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftgraph.sites import Sites

Find = Callable[[nn.Module, object], Sites]
Core = Callable[[Tensor, Tensor, Tensor, nn.ParameterDict], Tensor]
D, H, T = 12, 3, 7
E = torch.einsum


def apart(x: Tensor) -> Tensor:
    return x.unflatten(-1, (H, -1)).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """A residual attention around a core of q, k and v as they come from their projections."""

    def __init__(self, core: Core, shared: int = D) -> None:
        super().__init__()
        self.core = core
        self.q, self.k, self.v, self.o = (nn.Linear(D, wide) for wide in (D, shared, shared, D))
        self.own = nn.ParameterDict(
            {"mix": torch.randn(H, H), "point": torch.randn(H, H, 1, 1), "null": torch.randn(1, H, 1, D // H)}
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.o(self.core(self.q(x), self.k(x), self.v(x), self.own))


def scores(q: Tensor, k: Tensor) -> Tensor:
    return apart(q) @ apart(k).mT


def with_null(x: Tensor, null: Tensor) -> Tensor:
    return torch.cat([null.expand(x.shape[0], -1, -1, -1), apart(x)], dim=2)


def over_heads_last(weights: Tensor, mix: Tensor) -> Tensor:
    """DeepViT's re-attention, by a product and a norm over heads."""
    mixed = F.layer_norm(weights.permute(0, 2, 3, 1) @ mix, (H,))
    return mixed.permute(0, 3, 1, 2)


MIXED: dict[str, Core] = {
    "einsum before": lambda q, k, v, own: joined(E("bhij,hg->bgij", scores(q, k), own["mix"]).softmax(-1) @ apart(v)),
    "einsum after a bias": lambda q, k, v, own: joined(
        E("gh,bhij->bgij", own["mix"], scores(q, k) + own["mix"].sum()).softmax(-1) @ apart(v)
    ),
    "points before and after": lambda q, k, v, own: joined(
        F.conv2d(F.conv2d(scores(q, k), own["point"]).softmax(-1), own["point"]) @ apart(v)
    ),
    "product and norm after": lambda q, k, v, own: joined(
        over_heads_last(scores(q, k).softmax(-1), own["mix"]) @ apart(v)
    ),
    "null key": lambda q, k, v, own: joined(
        (apart(q) @ with_null(k, own["null"]).mT).softmax(-1) @ with_null(v, own["null"])
    ),
}


@pytest.mark.parametrize("name", MIXED)
def test_mixed_heads_are_attention(find: Find, name: str) -> None:
    sites = find(Attention(MIXED[name]), (torch.randn(2, T, D),))
    for role in "qkv":
        assert [(s.path, s.heads, s.head_dim) for s in sites.require(f"attention.{role}")] == [(role, H, D // H)]
    assert [s.path for s in sites.require("attention.o")] == ["o"]


def test_keys_mixed_over_positions_are_none(find: Find) -> None:
    """A product of the scores with a stored matrix over keys is no mixture of heads."""

    def core(q: Tensor, k: Tensor, v: Tensor, own: nn.ParameterDict) -> Tensor:
        return joined((scores(q, k)[..., :H] @ own["mix"]).softmax(-1) @ apart(v)[:, :, :H])

    sites = find(Attention(core), (torch.randn(2, T, D),))
    assert not sites.select("attention.q")


SHARED: dict[str, Core] = {
    "einsum": lambda q, k, v, own: joined(E("bhij,bjd->bhid", E("bhid,bjd->bhij", apart(q), k).softmax(-1), v)),
    "heads inside": lambda q, k, v, own: E(
        "bhij,bjd->bihd", E("bihd,bjd->bhij", q.unflatten(-1, (H, -1)), k).softmax(-1), v
    ).flatten(2),
    "rows of all heads": lambda q, k, v, own: joined(
        ((apart(q).flatten(1, 2) @ k.mT).softmax(-1) @ v).unflatten(1, (H, -1))
    ),
}


@pytest.mark.parametrize("name", SHARED)
def test_keys_without_an_axis_of_heads(find: Find, name: str) -> None:
    sites = find(Attention(SHARED[name], D // H), (torch.randn(2, T, D),))
    found = [(s.role[-1], s.path, s.heads, s.head_dim) for s in sites.select("attention.*&~attention.o")]
    assert found == [("q", "q", H, D // H), ("k", "k", 1, D // H), ("v", "v", 1, D // H)]


def raised(x: Tensor) -> Tensor:
    return F.elu(apart(x)) + 1


LINEAR: dict[str, Core] = {
    "k^T v first": lambda q, k, v, own: joined(raised(q) @ (raised(k).mT @ apart(v))),
    "over its sum": lambda q, k, v, own: joined(
        raised(q) @ (raised(k).mT @ apart(v)) / (raised(q) @ raised(k).sum(2, keepdim=True).mT)
    ),
    "softmax of q and of k": lambda q, k, v, own: joined(
        E("bhtd,bhde->bhte", apart(q).softmax(-1), E("bhtd,bhte->bhde", apart(k).softmax(2), apart(v)))
    ),
    "sums over the past": lambda q, k, v, own: joined(
        E("bhtd,bhtde->bhte", raised(q), E("bhtd,bhte->bhtde", raised(k), apart(v)).cumsum(2))
    ),
    "sigmoid": lambda q, k, v, own: joined((scores(q, k) / 2).sigmoid() @ apart(v)),
    "decay": lambda q, k, v, own: joined((scores(q, k) * torch.tril(own["mix"].sum().expand(T, T))) @ apart(v)),
}


@pytest.mark.parametrize("name", LINEAR)
def test_attention_without_a_softmax_is_linear(find: Find, name: str) -> None:
    sites = find(Attention(LINEAR[name]), (torch.randn(2, T, D),))
    for role in "qkv":
        found = [(s.path, s.kind, s.heads) for s in sites.require(f"attention.{role}")]
        assert found == [(role, "linear", H)], role
    assert [s.path for s in sites.require('attention.o&kind("linear")')] == ["o"]
    assert len(sites.select('attention&kind("linear")')) == 1
    assert not sites.select("attention.core")


def test_products_of_what_is_not_projected_are_no_attention(find: Find) -> None:
    class Unprojected(Attention):
        def forward(self, x: Tensor) -> Tensor:
            return x + self.o(joined(raised(self.q(x)) @ (raised(x).mT @ apart(self.v(x)))))

    sites = find(Unprojected(LINEAR["sigmoid"]), (torch.randn(2, T, D),))
    assert not sites.select("attention.*")


def test_an_explanation_says_that_there_is_no_softmax(find: Find) -> None:
    sites = find(Attention(LINEAR["k^T v first"]), (torch.randn(2, T, D),))
    shown = str(sites.explain("attention.q"))
    assert "a product of two, without a softmax (linear attention)" in shown
    assert "expected a softmax" in str(sites.explain("attention.core"))


def test_heads_of_attention_over_channels(find: Find) -> None:
    def core(q: Tensor, k: Tensor, v: Tensor, own: nn.ParameterDict) -> Tensor:
        q, k, v = (apart(x).mT for x in (q, k, v))
        return ((F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT).softmax(-1) @ v).permute(0, 3, 1, 2).flatten(2)

    sites = find(Attention(core), (torch.randn(2, T, D),))
    assert [(s.heads, s.head_dim) for s in sites.require("attention.q|attention.k|attention.v")] == [(H, D // H)] * 3


class Joint(nn.Module):
    """Two streams with projections of their own that attend to both."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(D, 3 * D), nn.Linear(D, 3 * D)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        pairs = zip(self.a(x).chunk(3, -1), self.b(y).chunk(3, -1), strict=True)
        q, k, v = (torch.cat([apart(one) for one in pair], dim=2) for pair in pairs)
        return (q @ k.mT).softmax(-1) @ v


def test_heads_are_those_of_each_projection(find: Find) -> None:
    sites = find(Joint(), (torch.randn(2, T, D), torch.randn(2, 5, D)))
    assert [(s.path, s.heads, s.head_dim) for s in sites.require("attention.q")] == [("a", H, 4), ("b", H, 4)]


# norms over channels, parallel streams, what is left out


class ChannelNorm(nn.Module):
    """ConvNeXt's norm of [batch, channels, ...], written out; without a gain it is none."""

    def __init__(self, gain: bool = True) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(D)), nn.Parameter(torch.zeros(D))
        self.point, self.gain = nn.Conv2d(D, D, 1), gain

    def forward(self, x: Tensor) -> Tensor:
        x = self.point(x)
        mean = x.mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt((x - mean).pow(2).mean(1, keepdim=True) + 1e-6)
        return self.weight[:, None, None] * x + self.bias[:, None, None] if self.gain else x


def test_a_norm_over_channels_that_is_written_out(find: Find) -> None:
    image = (torch.randn(2, D, 5, 7),)
    (norm,) = find(ChannelNorm(), image).require("norm")
    assert norm.bias is not None
    assert (norm.scale, norm.bias.parameter) == ("weight", "bias")
    assert not find(ChannelNorm(gain=False), image).select("norm")


class Streams(nn.Module):
    """Hyper-connections (arXiv 2409.19606): two streams, read and mixed by what is stored, or also by their values."""

    def __init__(self, parts: nn.ModuleList, worked_out: bool) -> None:
        super().__init__()
        self.parts, self.worked_out = parts, worked_out
        self.read, self.write, self.mix = (
            nn.ParameterList(torch.randn(*sizes) for _ in parts) for sizes in ((2,), (2,), (2, 2))
        )
        self.weigh, self.norm = nn.Linear(D, 2), nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unsqueeze(2).expand(-1, -1, 2, -1)
        for part, read, write, mix in zip(self.parts, self.read, self.write, self.mix, strict=True):
            weights = read.expand(x.shape[:3]) + (self.weigh(self.norm(x)).mean(-1).tanh() if self.worked_out else 0)
            y = part(self.norm(E("btnd,btn->btd", x, weights)))
            x = E("btnd,nm->btmd", x, mix) + E("btd,n->btnd", y, write)
        return x.sum(2)


class Plain(Attention):
    def __init__(self) -> None:
        super().__init__(lambda q, k, v, own: joined(scores(q, k).softmax(-1) @ apart(v)))

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.core(self.q(x), self.k(x), self.v(x), self.own))


@pytest.mark.parametrize("worked_out", [False, True])
def test_parallel_streams_are_one(find: Find, worked_out: bool) -> None:
    feed = [nn.Sequential(nn.Linear(D, 20), nn.GELU(), nn.Linear(20, D)) for _ in range(2)]
    parts = nn.ModuleList([Plain(), feed[0], Plain(), feed[1]])
    sites = find(Streams(parts, worked_out), (torch.randn(2, T, D),))
    assert [s.id for s in sites.require("block|attention|ffn")] == [
        f"{layer}.{role}" for layer in (0, 1) for role in ("attention", "block", "ffn")
    ]
    assert [s.path for s in sites.select("ffn.down")] == ["parts.1.2", "parts.3.2"]


def test_an_attention_without_a_residual_add_is_absent(find: Find) -> None:
    sites = find(nn.Sequential(Attention(MIXED["null key"]), Plain(), nn.Linear(D, 2)), (torch.randn(2, T, D),))
    assert len(sites.select("attention")) == 1
    (absent,) = sites.lacking("attention")
    assert (absent.site.path, absent.site.kind) == ("1", "self")
    assert "enters no residual add, it is read by" in str(absent)
    assert not sites.lacking("ffn|attention.q|attention&layers(0)")
