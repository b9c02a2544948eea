"""Models nobody has a table for; each comes with a twin that nearly is one and must not be taken for it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from peftgraph.errors import NoMatch
from peftgraph.sites import Columns, Sites

Find = Callable[[nn.Module, object], Sites]
D, H = 12, 3


def x() -> tuple[torch.Tensor]:
    return (torch.randn(3, 7, D),)


def columns(sites: Sites, selector: str) -> list[Columns | None]:
    return [site.columns for site in sites.require(selector)]


def heads(value: torch.Tensor) -> torch.Tensor:
    return value.unflatten(-1, (H, -1)).transpose(1, 2)


class Fused(nn.Module):
    """nanoGPT's block: one linear for q, k and v, cut by split; or the same by einsum."""

    def __init__(self, einsum: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.einsum = einsum
        self.ln_1, self.ln_2 = nn.LayerNorm(D), nn.LayerNorm(D, bias=bias)
        self.c_attn, self.c_proj = nn.Linear(D, 3 * D, bias=bias), nn.Linear(D, D, bias=bias)
        self.up, self.down = nn.Linear(D, 20, bias=bias), nn.Linear(20, D, bias=bias)

    def fused(self, value: torch.Tensor) -> torch.Tensor:
        if self.einsum:
            return torch.einsum("btc,fc->btf", value, self.c_attn.weight)
        return self.c_attn(value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (heads(part) for part in self.fused(self.ln_1(x)).split(D, dim=2))
        if self.einsum:
            weights = torch.softmax(torch.einsum("bhid,bhjd->bhij", q, k) / 2, dim=-1)
            mixed = torch.einsum("bhij,bhjd->bhid", weights, v)
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.c_proj(mixed.transpose(1, 2).reshape(x.shape))
        return x + self.down(F.gelu(self.up(self.ln_2(x))))


@pytest.mark.parametrize("einsum", [False, True])
def test_nanogpt(find: Find, einsum: bool) -> None:
    sites = find(nn.Sequential(Fused(einsum), Fused(einsum)), x())
    for i, role in enumerate("qkv"):
        assert columns(sites, f"attention.{role}") == [Columns(((D * i, D * i + D),))] * 2
    assert [site.layer for site in sites.select("block")] == [0, 1]
    assert [site.path for site in sites.select("attention.o")] == ["0.c_proj", "1.c_proj"]
    assert [site.path for site in sites.select("ffn.down")] == ["0.down", "1.down"]


class KeysFirst(nn.Module):
    """The scores are written k q^T and the softmax runs along the axis of the keys, which is the first."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.o = (nn.Linear(D, D) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = torch.softmax(self.a(x) @ self.b(x).transpose(1, 2), dim=1)
        return x + self.o(weights.transpose(1, 2) @ self.c(x))


def test_k_is_the_operand_whose_axis_the_softmax_runs_along(find: Find) -> None:
    sites = find(KeysFirst(), x())
    assert [site.path for site in sites.require("attention.k")] == ["a"]
    assert [site.path for site in sites.require("attention.q")] == ["b"]
    assert [site.heads for site in sites.select("attention.q")] == [1]


class ChannelGate(nn.Module):
    """A softmax of a product, but no third product: near attention."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(self.a(x) @ self.b(x).transpose(1, 2), dim=-1).sum(-1)


class Weighted(nn.Module):
    """A softmax over channels of one projection: nearer to a router."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.softmax(self.a(x), dim=-1) * self.b(x)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (ChannelGate(), "expected a product of the result with a third value (v), found %head.1.sum (sum)"),
        (Weighted(), "expected a product of two signals (q k^T) behind it, found %0.projection.0 (linear)"),
        (nn.Sequential(nn.Linear(D, 8), nn.ReLU(), nn.Linear(8, 4)), "no softmax, no scaled_dot_product_attention"),
    ],
)
def test_near_attention(find: Find, module: nn.Module, reason: str) -> None:
    sites = find(module, x())
    with pytest.raises(NoMatch, match=r"attention\.q: 0 sites in \d nodes\n    nothing plays attention\.q") as raised:
        sites.require("attention.q")
    assert reason in str(raised.value)


class Gated(nn.Module):
    """SwiGLU with one fused projection, in either order; `residual` decides whether it is a feed-forward."""

    def __init__(self, gate_first: bool = True, residual: bool = True, bent: bool = True) -> None:
        super().__init__()
        self.gate_first, self.residual, self.bent = gate_first, residual, bent
        self.norm, self.fused, self.down = nn.LayerNorm(D), nn.Linear(D, 16), nn.Linear(8, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.fused(self.norm(x)).chunk(2, dim=-1)
        gate, up = (a, b) if self.gate_first else (b, a)
        y = self.down((F.silu(gate) if self.bent else gate) * up)
        return x + y if self.residual else y


@pytest.mark.parametrize("gate_first", [True, False])
def test_gate_and_up_by_the_side_of_the_nonlinearity(find: Find, gate_first: bool) -> None:
    sites = find(Gated(gate_first), x())
    first, second = Columns(((0, 8),)), Columns(((8, 16),))
    assert columns(sites, "ffn.gate") == [first if gate_first else second]
    assert columns(sites, "ffn.up") == [second if gate_first else first]


def test_no_feed_forward_without_a_join_or_a_nonlinearity(find: Find) -> None:
    loose = find(Gated(residual=False), x()).explain("ffn.down").problem
    assert "expected a projection whose result enters a residual add, found the model's output" in loose
    linear = find(Gated(bent=False), x()).explain("ffn.up").problem
    assert "expected a nonlinearity between it and the projection before it, found " in linear


class Squeeze(nn.Module):
    """Squeeze and excitation: two projections and a nonlinearity gate a branch, channel by channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(D, D, 3, padding=1)
        self.a, self.b = nn.Linear(D, 4), nn.Linear(4, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x.transpose(1, 2)).transpose(1, 2)
        return x + y * torch.sigmoid(self.b(F.relu(self.a(y.mean(1))))).unsqueeze(1)


class Pooled(nn.Module):
    """A block, then a probe with a residual feed-forward of its own: no second layer."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.probe = Fused(), nn.Linear(D, D)
        self.up, self.down = nn.Linear(D, 8), nn.Linear(8, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.probe(self.block(x).mean(1))
        return x + self.down(F.relu(self.up(x)))


def test_a_stream_without_attention_has_no_layers_where_another_has(find: Find) -> None:
    sites = find(Pooled(), x())
    assert sites.layers == 1
    assert [(site.path, site.layer) for site in sites.select("ffn.up")] == [("block.up", 0), ("up", None)]


def test_squeeze_and_excitation_is_no_feed_forward(find: Find) -> None:
    sites = find(Squeeze(), x())
    assert not sites.select("ffn|ffn.*|attention")
    assert "conv.bias" in [site.path for site in sites.select("bias")]


class Positions(nn.Module):
    """`embedding + positions` is an add, but no join."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(30, D), nn.Embedding(20, D)
        self.block, self.head = Fused(), nn.Linear(D, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        return self.head(self.block(x))


def test_adding_positions_is_no_join(find: Find) -> None:
    sites = find(Positions(), (torch.randint(0, 30, (3, 7)),))
    assert sites.layers == 1
    assert [site.path for site in sites.select("embedding")] == ["tokens"]
    assert [site.path for site in sites.select("head")] == ["head"]
    assert len(sites.select("attention|ffn")) == 2


class Experts(nn.Module):
    """A list of experts, all computed, weighed by a router."""

    def __init__(self, routed: bool = True) -> None:
        super().__init__()
        self.routed = routed
        self.route = nn.Linear(D, 3)
        self.ups = nn.ModuleList(nn.Linear(D, 8) for _ in range(3))
        self.downs = nn.ModuleList(nn.Linear(8, D) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = torch.softmax(self.route(x), dim=-1)
        parts = [down(F.relu(up(x))) for up, down in zip(self.ups, self.downs, strict=True)]
        if self.routed:
            parts = [part * weights[..., i : i + 1] for i, part in enumerate(parts)]
        return x + (parts[0] + parts[1] + parts[2])


def test_a_list_of_experts_is_numbered_and_the_router_is_none(find: Find) -> None:
    sites = find(Experts(), x())
    assert [(site.path, site.expert) for site in sites.select("ffn.up")] == [(f"ups.{i}", i) for i in range(3)]
    assert [site.id for site in sites.select("ffn.down&expert(2)")] == ["0.ffn.down[expert 2]"]
    assert [site.path for site in sites.select("router")] == ["route"]
    assert not [site for site in sites.select("ffn.*|projection") if site.path == "route"]


def test_parallel_feed_forwards_without_a_router_are_no_experts(find: Find) -> None:
    sites = find(Experts(routed=False), x())
    assert {site.expert for site in sites.select("ffn.up")} == {None}


@pytest.mark.parametrize("norm_first", [True, False])
def test_torch_encoder_layer(find: Find, norm_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(D, H, 20, batch_first=True, norm_first=norm_first)
    sites = find(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), x())
    for i, role in enumerate("qkv"):
        assert columns(sites, f"attention.{role}") == [Columns(((D * i, D * i + D),))] * 2
    assert {site.layout for site in sites.select("attention")} == {"pre" if norm_first else "post"}


class Memory(nn.Module):
    """nn.MultiheadAttention between two values: one packed weight, cut before it is used."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.MultiheadAttention(D, H, batch_first=True)

    def forward(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        return x + self.mix(x, memory, memory, need_weights=False)[0]


def test_a_packed_weight_has_windows(find: Find) -> None:
    sites = find(Memory(), (torch.randn(3, 7, D), torch.randn(3, 5, D)))
    windows = {}
    for role in "qkv":
        (site,) = sites.require(f"attention.{role}")
        assert site.weight is not None
        assert site.weight.parameter == "mix.in_proj_weight"
        assert site.kind == "cross"
        windows[role] = site.weight.window
    assert windows == {role: Columns(((D * i, D * i + D),)) for i, role in enumerate("qkv")}


def test_attention_free_nets_have_blocks_and_projections(find: Find) -> None:
    class Mix(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 8), nn.GELU(), nn.Linear(8, D))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.f(x)

    sites = find(nn.Sequential(Mix(), Mix(), nn.Linear(D, 2)), x())
    assert not sites.select("attention|attention.*|attention.core")
    assert [site.path for site in sites.select("block")] == ["0.f", "1.f"]
    assert [site.path for site in sites.select("head")] == ["2"]


class ComplexRotary(nn.Module):
    """Queries and keys are turned as complex numbers; q and k share a projection, head by head."""

    def __init__(self) -> None:
        super().__init__()
        self.qk, self.v, self.o = nn.Linear(D, 2 * D), nn.Linear(D, D), nn.Linear(D, D)

    def turned(self, value: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(value.unflatten(-1, (-1, 2)).contiguous())
        angle = torch.arange(value.shape[-2], device=value.device)[:, None] * torch.tensor([1.0, 0.1])
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k = self.qk(x).unflatten(-1, (H, 2, -1)).unbind(-2)
        q, k = self.turned(q.transpose(1, 2)), self.turned(k.transpose(1, 2))
        mixed = F.scaled_dot_product_attention(q, k, heads(self.v(x)))
        return x + self.o(mixed.transpose(1, 2).flatten(2))


def test_both_features_of_a_complex_pair_arrive(find: Find) -> None:
    sites = find(ComplexRotary(), x())
    each = D // H
    for start, role in enumerate("qk"):
        runs = tuple(((2 * head + start) * each, (2 * head + start + 1) * each) for head in range(H))
        assert columns(sites, f"attention.{role}") == [Columns(runs)]


class Scan(nn.Module):
    """A state-space mixer in small: the scan adds its own input, scaled, inside the branch."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.b, self.o = nn.LayerNorm(D), nn.Linear(D, 20), nn.Linear(20, 20), nn.Linear(20, D)
        self.scale = nn.Parameter(torch.rand(20))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.silu(self.a(self.norm(x)))
        return x + self.o(torch.cumsum(self.b(h), 1) + h * self.scale)


def test_a_residual_add_inside_a_branch_does_not_hide_the_one_around_it(find: Find) -> None:
    sites = find(nn.Sequential(Fused(), Scan(), Feed(), Fused()), x())
    assert [(site.path, site.layer) for site in sites.select("ffn.down")] == [
        ("0.down", 0),
        ("2.down", 1),
        ("3.down", 2),
    ]


class Feed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(D), nn.Linear(D, 20), nn.Linear(20, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class ShiftedGain(nn.Module):
    """A norm whose gain is 1 + w (Gemma), and a bias that is added to a signal."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.zeros(D)), nn.Parameter(torch.zeros(D))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return F.gelu(normed * (1 + self.w)) + self.b


def test_a_gain_of_one_plus_w_is_no_bias(find: Find) -> None:
    sites = find(ShiftedGain(), x())
    assert [site.path for site in sites.select("bias")] == ["b"]
    assert [site.scale for site in sites.select("norm")] == ["w"]
