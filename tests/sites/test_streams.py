"""Streams that meet: joint attention, learned latents, coarser grids, layers that take turns, modulated norms."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftgraph.sites import Columns, Sites

Find = Callable[[nn.Module, object], Sites]
D, H = 12, 3


def heads(value: Tensor) -> Tensor:
    return value.unflatten(-1, (H, -1)).transpose(1, 2)


def paths(sites: Sites, selector: str) -> list[str]:
    return [site.path for site in sites.require(selector)]


def missed(sites: Sites, role: str) -> str:
    """What stands where a role was looked for."""
    (miss,) = (miss for miss in sites.misses if miss.role == role)
    return miss.found


class Attend(nn.Module):
    """q from one value, k and v from another."""

    def __init__(self, memory: int = D) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(D, D), nn.Linear(D, D)
        self.k, self.v = nn.Linear(memory, D), nn.Linear(memory, D)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        q, k, v = heads(self.q(x)), heads(self.k(memory)), heads(self.v(memory))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Feed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(D), nn.Linear(D, 20), nn.Linear(20, D)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Joint(nn.Module):
    """Two streams attend to both, put one after the other. `parted`: each takes its own piece back."""

    def __init__(self, parted: bool = True) -> None:
        super().__init__()
        self.parted = parted
        self.image, self.text = (nn.ModuleDict({name: nn.Linear(D, D) for name in "qkvo"}) for _ in range(2))
        self.feeds = nn.ModuleList([Feed(), Feed()])

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (torch.cat((heads(self.image[n](x)), heads(self.text[n](y))), dim=2) for n in "qkv")
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        a, b = (mixed[:, : x.shape[1]], mixed[:, x.shape[1] :]) if self.parted else (mixed, mixed)
        if not self.parted:
            return x + self.image["o"](a)[:, : x.shape[1]], self.text["o"](b)
        return self.feeds[0](x + self.image["o"](a)), self.feeds[1](y + self.text["o"](b))


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Joint(), Joint()])

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        for block in self.blocks:
            x, y = block(x, y)
        return x, y


def two() -> tuple[Tensor, Tensor]:
    return torch.randn(3, 7, D), torch.randn(3, 5, D)


def test_joint_attention_has_every_role_once_for_each_stream(find: Find) -> None:
    sites = find(Both(), two())
    for role in "qkvo":
        found = sites.require(f"attention.{role}")
        assert [site.path for site in found] == [f"blocks.{i}.{n}.{role}" for i in (0, 1) for n in ("image", "text")]
        assert [(site.layer, site.stack) for site in found] == [(0, None), (0, None), (1, None), (1, None)]
        assert {site.kind for site in found} == {"self"}
    sublayers = sites.require("attention&layers(0)")
    assert len({site.ports["input"] for site in sublayers}) == len({site.ports["join"] for site in sublayers}) == 2
    assert sites.layers == 2


def test_a_second_reader_of_the_same_positions_is_no_output_projection(find: Find) -> None:
    sites = find(Joint(parted=False), two())
    assert paths(sites, "attention.o") == ["image.o"]


class Latents(nn.Module):
    """Learned latents attend to the input. `bare`: nothing projects them."""

    def __init__(self, bare: bool = False) -> None:
        super().__init__()
        self.latents, self.norm = nn.Parameter(torch.randn(4, D)), nn.LayerNorm(D)
        self.read, self.feed = Attend(10), Feed()
        if bare:
            self.read.q = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]

    def forward(self, x: Tensor) -> Tensor:
        latents = self.latents.expand(x.shape[0], -1, -1)
        return self.feed(latents + self.read(self.norm(latents), x))


def test_learned_latents_are_projected_and_carry_a_stream(find: Find) -> None:
    sites = find(Latents(), (torch.randn(3, 7, 10),))
    assert paths(sites, "attention.q") == ["read.q"]
    (attention,) = sites.require("attention")
    assert (attention.kind, attention.layout) == ("cross", "pre")
    assert paths(sites, "ffn.down") == ["feed.down"]


def test_latents_that_nothing_projects_have_no_q(find: Find) -> None:
    sites = find(Latents(bare=True), (torch.randn(3, 7, 10),))
    assert "%latents behind q" in missed(sites, "attention.q")
    assert paths(sites, "attention.k") == ["read.k"]


class Coarse(nn.Module):
    """k and v see a grid at half the resolution: of the same stream, or of another stem's."""

    def __init__(self, own: bool) -> None:
        super().__init__()
        self.own = own
        self.stem, self.other = nn.Conv2d(3, D, 2, stride=2), nn.Conv2d(3, D, 4, stride=4)
        self.reduce, self.attend, self.feed = nn.Conv2d(D, D, 2, stride=2), Attend(), Feed()

    def forward(self, image: Tensor) -> Tensor:
        grid = self.stem(image)
        x = grid.flatten(2).transpose(1, 2)
        coarse = self.reduce(grid) if self.own else self.other(image)
        return self.feed(x + self.attend(x, coarse.flatten(2).transpose(1, 2)))


@pytest.mark.parametrize(("own", "kind"), [(True, "self"), (False, "cross")])
def test_a_coarser_grid_of_the_same_stream_is_self_attention(find: Find, own: bool, kind: str) -> None:
    sites = find(Coarse(own), (torch.randn(3, 3, 8, 8),))
    assert {site.kind for site in sites.require("attention.q|attention.k|attention.v")} == {kind}


class Turns(nn.Module):
    """Softmax attention and a running mean take turns; `fed`: a feed-forward follows each."""

    def __init__(self, order: str, fed: bool = True) -> None:
        super().__init__()
        self.order = order
        self.attends = nn.ModuleList(Attend() for _ in order)
        self.feeds = nn.ModuleList(Feed() if fed else nn.Identity() for _ in order)

    def forward(self, x: Tensor) -> Tensor:
        for kind, attend, feed in zip(self.order, self.attends, self.feeds, strict=True):
            x = feed(x + (attend(x, x) if kind == "a" else attend.o(attend.v(x).mean(1, keepdim=True).expand_as(x))))
        return x


@pytest.mark.parametrize("order", ["amam", "mmma"])
def test_layers_may_take_turns_in_how_they_mix(find: Find, order: str) -> None:
    sites = find(Turns(order), (torch.randn(3, 7, D),))
    assert [site.layer for site in sites.require("ffn.up")] == [0, 1, 2, 3]
    assert [site.layer for site in sites.require("attention")] == [i for i in range(4) if order[i] == "a"]


def test_without_a_feed_forward_two_mixers_in_turns_are_one_layer(find: Find) -> None:
    sites = find(Turns("amam", fed=False), (torch.randn(3, 7, D),))
    assert [site.layer for site in sites.require("attention")] == [0, 1]


class Modulated(nn.Module):
    """A condition scales and shifts what the sublayer reads; with or without a norm."""

    def __init__(self, normed: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D, elementwise_affine=False) if normed else nn.Identity()
        self.attend, self.condition = Attend(), nn.Linear(5, 2 * D)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.condition(F.silu(condition)).unsqueeze(1).chunk(2, dim=-1)
        y = self.norm(x) * (1 + scale) + shift
        return x + self.attend(y, y)


@pytest.mark.parametrize(("normed", "layout"), [(True, "pre"), (False, None)])
def test_a_modulated_norm_is_a_norm_before(find: Find, normed: bool, layout: str | None) -> None:
    sites = find(Modulated(normed), (torch.randn(3, 7, D), torch.randn(3, 5)))
    assert [site.layout for site in sites.require("attention")] == [layout]
    assert not sites.select("ffn|ffn.*")
    assert paths(sites, "projection") == ["condition"]


class Turned(nn.Module):
    """Rotary embedding that writes both members of a pair as a mixture of both, first member first; into slices
    of an empty value, or stacked."""

    def __init__(self, written: bool) -> None:
        super().__init__()
        self.written = written
        self.qkv, self.o = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def turned(self, x: Tensor) -> Tensor:
        angle = torch.arange(x.shape[-2], device=x.device)[:, None] * torch.tensor([0.5, 0.25], device=x.device)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        if not self.written:
            return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)
        out = torch.empty_like(x)
        out[..., 0::2] = a * cos - b * sin
        out[..., 1::2] = a * sin + b * cos
        return out

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads(part) for part in self.qkv(x).chunk(3, dim=-1))
        mixed = F.scaled_dot_product_attention(self.turned(q), self.turned(k), v)
        return x + self.o(mixed.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("written", [True, False])
def test_no_feature_hides_behind_the_one_it_is_turned_with(find: Find, written: bool) -> None:
    sites = find(Turned(written), (torch.randn(3, 7, D),))
    for i, role in enumerate("qkv"):
        (site,) = sites.require(f"attention.{role}")
        assert (site.columns, site.heads, site.head_dim) == (Columns(((D * i, D * i + D),)), H, D // H)


class Gated(nn.Module):
    """v times a gate, both from one linear: what gates v is not v."""

    def __init__(self) -> None:
        super().__init__()
        self.mixed, self.o = nn.Linear(D, 4 * D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, gate = (heads(part) for part in self.mixed(x).chunk(4, dim=-1))
        mixed = F.scaled_dot_product_attention(q, k, v * torch.sigmoid(gate))
        return x + self.o(mixed.transpose(1, 2).flatten(2))


def test_what_gates_a_value_is_no_part_of_it(find: Find) -> None:
    (site,) = find(Gated(), (torch.randn(3, 7, D),)).require("attention.v")
    assert site.columns == Columns(((2 * D, 3 * D),))


class Talking(nn.Module):
    """Talking heads: linears over the heads before and after the softmax; or over the keys, which is none."""

    def __init__(self, over_heads: bool) -> None:
        super().__init__()
        self.over_heads, size = over_heads, H if over_heads else 7
        self.qkv, self.o = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.before, self.after = nn.Linear(size, size), nn.Linear(size, size)

    def over(self, linear: nn.Module, scores: Tensor) -> Tensor:
        return linear(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if self.over_heads else linear(scores)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads(part) for part in self.qkv(x).chunk(3, dim=-1))
        weights = self.over(self.after, self.over(self.before, q @ k.transpose(-2, -1) / 2).softmax(-1))
        return x + self.o((weights @ v).transpose(1, 2).flatten(2))


def test_heads_may_talk(find: Find) -> None:
    sites = find(Talking(True), (torch.randn(5, 7, D),))
    for i, role in enumerate("qkv"):
        (site,) = sites.require(f"attention.{role}")
        assert site.columns == Columns(((D * i, D * i + D),))
    assert paths(sites, "attention.o") == ["o"]
    assert paths(sites, "projection") == ["before", "after"]


def test_scores_projected_along_the_keys_are_none_of_attention(find: Find) -> None:
    sites = find(Talking(False), (torch.randn(5, 7, D),))
    assert not sites.select("attention.*")
    assert missed(sites, "attention.core") == "%linear_1 (linear)"


class Positional(nn.Module):
    """Weights by content and weights by position, mixed by a gate, or only by position."""

    def __init__(self, content: bool) -> None:
        super().__init__()
        self.content = content
        self.qkv, self.o = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.table, self.gate = nn.Parameter(torch.randn(H, 7, 7)), nn.Parameter(torch.randn(H, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads(part) for part in self.qkv(x).chunk(3, dim=-1))
        weights = self.table.softmax(-1).expand(x.shape[0], -1, -1, -1)
        if self.content:
            gate = torch.sigmoid(self.gate)
            weights = (1 - gate) * (q @ k.transpose(-2, -1) / 2).softmax(-1) + gate * weights
        return x + self.o((weights @ v).transpose(1, 2).flatten(2))


def test_weights_by_content_may_be_mixed_with_weights_by_position(find: Find) -> None:
    sites = find(Positional(True), (torch.randn(5, 7, D),))
    assert [len(sites.require(f"attention.{role}")) for role in "qkvo"] == [1, 1, 1, 1]
    assert not find(Positional(False), (torch.randn(5, 7, D),)).select("attention.*")


class Scan(nn.Module):
    """A layer of a state space: what is scanned, and its input scaled beside it, inside of one residual branch."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.enter, self.gate, self.leave = nn.Linear(D, 20), nn.Linear(20, 20), nn.Linear(20, D)
        self.scale = nn.Parameter(torch.ones(20))

    def forward(self, x: Tensor) -> Tensor:
        u = F.silu(self.enter(self.norm(x)))
        state = torch.cumsum(F.softplus(self.gate(u)) * u, 1)
        return x + self.leave(state + self.scale * u)


def test_a_sum_inside_a_layer_is_no_layer(find: Find) -> None:
    sites = find(nn.Sequential(Scan(), Scan(), Scan()), (torch.randn(2, 5, D),))
    assert [(site.id, site.layer) for site in sites.require("block")] == [(f"{i}.block", i) for i in range(3)]
