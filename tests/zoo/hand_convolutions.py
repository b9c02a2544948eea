"""Hand-written models with convolutions, and models without any attention: what must not be taken for one."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .entry import Entry, Expected, Truth
from .hand_attention import FUSED, MLP, SEPARATE, B, Block, D, Fused, H, M, S, heads, merge, sequence
from .hand_models import GatedMlp, Mixed, ids, truth_of
from .notation import Example, attention, entry, feedforward

NONE = Truth((), ())


class Residual(nn.Module):
    """Two 3 x 3 convolutions, and a time embedding where there is one."""

    def __init__(self, inner: int, outer: int, time: int | None = None) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(inner, outer, 3, padding=1), nn.Conv2d(outer, outer, 3, padding=1)
        self.first, self.second = nn.GroupNorm(2, inner), nn.GroupNorm(2, outer)
        self.time = None if time is None else nn.Linear(time, outer)
        self.skip = nn.Identity() if inner == outer else nn.Conv2d(inner, outer, 1)

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        y = self.a(F.silu(self.first(x)))
        if self.time is not None and time is not None:
            y = y + self.time(F.silu(time))[:, :, None, None]
        return self.skip(x) + self.b(F.silu(self.second(y)))


class Spatial(nn.Module):
    """A transformer over the pixels of a feature map, between two 1 x 1 convolutions."""

    def __init__(self, memory: int = 10) -> None:
        super().__init__()
        self.norm, self.enter, self.leave = nn.GroupNorm(2, D), nn.Conv2d(D, D, 1), nn.Conv2d(D, D, 1)
        self.own, self.across, self.mlp = Mixed(), Mixed(D, memory), GatedMlp()
        self.norms = nn.ModuleList(nn.LayerNorm(D) for _ in range(3))

    def forward(self, image: Tensor, memory: Tensor) -> Tensor:
        x = self.enter(self.norm(image)).flatten(2).transpose(1, 2)
        x = x + self.own(self.norms[0](x))
        x = x + self.across(self.norms[1](x), memory)
        x = x + self.mlp(self.norms[2](x))
        return image + self.leave(x.transpose(1, 2).unflatten(2, image.shape[2:]))


class UNet(nn.Module):
    """Down, middle and up with a skip by concatenation, attention to text at both resolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 16))
        self.enter = nn.Conv2d(4, D, 3, padding=1)
        self.before, self.high = Residual(D, D, 16), Spatial()
        self.down = nn.Conv2d(D, D, 3, stride=2, padding=1)
        self.middle, self.low = Residual(D, D, 16), Spatial()
        self.after, self.leave = Residual(2 * D, D, 16), nn.Conv2d(D, 4, 3, padding=1)

    def forward(self, image: Tensor, time: Tensor, memory: Tensor) -> Tensor:
        t = self.time(time)
        x = high = self.high(self.before(self.enter(image), t), memory)
        x = self.low(self.middle(self.down(x), t), memory)
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.leave(F.silu(self.after(torch.cat((x, high), dim=1), t)))


class Restormer(nn.Module):
    """Attention over channels of a feature map; q, k and v pass depthwise convolutions, and so does the gate."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.GroupNorm(1, D), nn.GroupNorm(1, D)
        self.temperature = nn.Parameter(torch.ones(H, 1, 1))
        self.qkv, self.local = nn.Conv2d(D, 3 * D, 1), nn.Conv2d(3 * D, 3 * D, 3, padding=1, groups=3 * D)
        self.out = nn.Conv2d(D, D, 1)
        self.both, self.spread = nn.Conv2d(D, 80, 1), nn.Conv2d(80, 80, 3, padding=1, groups=80)
        self.down = nn.Conv2d(40, D, 1)

    def mixed(self, x: Tensor) -> Tensor:
        q, k, v = (one.flatten(2).unflatten(1, (H, -1)) for one in self.local(self.qkv(x)).chunk(3, dim=1))
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        return self.out(((scores * self.temperature).softmax(-1) @ v).flatten(1, 2).unflatten(2, x.shape[2:]))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixed(self.first(x))
        gate, value = self.spread(self.both(self.second(x))).chunk(2, dim=1)
        return x + self.down(F.gelu(gate) * value)


class Reduced(nn.Module):
    """Attention of all positions to a coarser grid (a strided convolution before k and v), and a feed-forward
    with a depthwise convolution inside."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.between = nn.LayerNorm(D), nn.LayerNorm(D), nn.LayerNorm(D)
        self.q, self.kv, self.o = nn.Linear(D, D), nn.Linear(D, 2 * D), nn.Linear(D, D)
        self.reduce = nn.Conv2d(D, D, 2, stride=2)
        self.up, self.down = nn.Linear(D, 40), nn.Linear(40, D)
        self.local = nn.Conv2d(40, 40, 3, padding=1, groups=40)

    def mixed(self, x: Tensor) -> Tensor:
        coarse = self.reduce(x.transpose(1, 2).unflatten(2, (8, 8))).flatten(2).transpose(1, 2)
        k, v = (heads(one) for one in self.kv(self.between(coarse)).chunk(2, dim=-1))
        return self.o(merge(F.scaled_dot_product_attention(heads(self.q(x)), k, v)))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixed(self.first(x))
        y = self.up(self.second(x)).transpose(1, 2).unflatten(2, (8, 8))
        return x + self.down(F.gelu(self.local(y).flatten(2).transpose(1, 2)))


class Convolved(nn.Module):
    """CvT's attention: depthwise convolutions before the linears of q, k and v."""

    def __init__(self) -> None:
        super().__init__()
        self.local = nn.ModuleDict({name: nn.Conv2d(D, D, 3, padding=1, groups=D) for name in "qkv"})
        self.q, self.k, self.v, self.o = (nn.Linear(D, D) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        image = x.transpose(1, 2).unflatten(2, (8, 8))
        q, k, v = (
            heads(linear(self.local[name](image).flatten(2).transpose(1, 2)))
            for name, linear in (("q", self.q), ("k", self.k), ("v", self.v))
        )
        return self.o(merge(F.scaled_dot_product_attention(q, k, v)))


class ResNet(nn.Module):
    """Convolutions, batch norm and a squeeze-and-excitation gate."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.head = nn.Conv2d(3, D, 3, padding=1), nn.Linear(D, 5)
        self.blocks = nn.ModuleList([Residual(D, D), Residual(D, D)])
        self.squeeze, self.excite, self.norm = nn.Linear(D, 6), nn.Linear(6, D), nn.BatchNorm2d(D)

    def forward(self, image: Tensor) -> Tensor:
        x = self.enter(image)
        for block in self.blocks:
            x = block(x)
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3))))))
        return self.head(self.norm(x + self.blocks[0].b(x) * gate[:, :, None, None]).mean((2, 3)))


class Bottleneck(nn.Module):
    """ResNet's bottleneck: 1 x 1, 3 x 3, 1 x 1. The 3 x 3 mixes positions, so this is no feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(D, 10, 1), nn.Conv2d(10, 10, 3, padding=1), nn.Conv2d(10, D, 1)

    def forward(self, input: Tensor) -> Tensor:
        return F.relu(input + self.c(F.relu(self.b(F.relu(self.a(input))))))


class Recurrent(nn.Module):
    """Embeddings, a recurrent layer, a head."""

    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU], both_ways: bool) -> None:
        super().__init__()
        self.tokens = nn.Embedding(31, D)
        self.layer = kind(D, 20, num_layers=2, batch_first=True, bidirectional=both_ways)
        self.head = nn.Linear(40 if both_ways else 20, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.layer(self.tokens(ids))[0])


class Mixer(nn.Module):
    """An MLP over positions, then one over channels. Only the second is a feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(D), nn.LayerNorm(D)
        self.tokens, self.back, self.up, self.down = (
            nn.Linear(S, 10),
            nn.Linear(10, S),
            nn.Linear(D, 40),
            nn.Linear(40, D),
        )

    def forward(self, input: Tensor) -> Tensor:
        x = input + self.back(F.gelu(self.tokens(self.first(input).transpose(1, 2)))).transpose(1, 2)
        return x + self.down(F.gelu(self.up(self.second(x))))


class Fourier(nn.Module):
    """FNet: the real part of a Fourier transform mixes positions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(D), nn.LayerNorm(D)
        self.up, self.down = nn.Linear(D, 40), nn.Linear(40, D)

    def forward(self, input: Tensor) -> Tensor:
        x = self.first(input + torch.fft.fft2(input).real)
        return self.second(x + self.down(F.gelu(self.up(x))))


class Pooled(nn.Module):
    """A softmax over positions weighs one projection by another: pooling by attention, without q and k."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.score, self.value, self.head = (
            Block(Fused()),
            nn.Linear(D, 1),
            nn.Linear(D, D),
            nn.Linear(D, 5),
        )

    def forward(self, input: Tensor) -> Tensor:
        x = self.block(input)
        return self.head((self.score(x).softmax(1) * self.value(x)).sum(1))


def spatial(stem: str) -> tuple[Expected, ...]:
    gated = {"up": "both.weight[0:40]", "gate": "both.weight[40:80]", "down": "down.weight"}
    return (
        attention(f"{stem}.own", layout="pre", **SEPARATE),
        attention(f"{stem}.across", kind="cross", layout="pre", **SEPARATE),
        feedforward(f"{stem}.mlp", layout="pre", **gated),
    )


def restormer(i: int) -> tuple[Expected, ...]:
    gated = {"gate": "both.weight[0:40]", "up": "both.weight[40:80]", "down": "down.weight"}
    return (
        attention(str(i), layer=i, layout="pre", **FUSED),
        feedforward(str(i), layer=i, layout="pre", **gated),
    )


def reduced(i: int) -> tuple[Expected, ...]:
    roles = {"q": "q.weight", "k": f"kv.weight[0:{D}]", "v": f"kv.weight[{D}:{2 * D}]", "o": "o.weight"}
    return (
        attention(str(i), layer=i, layout="pre", **roles),
        feedforward(str(i), layer=i, layout="pre", **MLP),
    )


def convolved(i: int) -> tuple[Expected, ...]:
    return (
        attention(f"{i}.mix", layer=i, layout="pre", **SEPARATE),
        feedforward(f"{i}.mlp", layer=i, layout="pre", **MLP),
    )


def noisy() -> Example:
    return {"image": torch.randn(B, 4, 10, 12), "time": torch.randn(B, 8), "memory": torch.randn(B, M, 10)}


def twice(make: type[nn.Module]) -> nn.Module:
    return nn.Sequential(make(), make())


def features() -> Example:
    return {"input": torch.randn(B, D, 10, 12)}


def pixels() -> Example:
    return {"input": torch.randn(B, 64, D)}


def channel_mlps(*layers: int) -> Truth:
    return Truth((), tuple(feedforward(str(i), layer=i, **MLP) for i in layers))


POOLED = truth_of([(attention("block.mix", layout="pre", **FUSED), feedforward("block.mlp", layout="pre", **MLP))])

ENTRIES: list[Entry] = [
    entry("u-net", "hand-written", UNet, noisy, truth_of([spatial("high"), spatial("low")])),
    entry(
        "channels-convolved", "hand-written", lambda: twice(Restormer), features, truth_of([restormer(0), restormer(1)])
    ),
    entry("reduced-keys", "hand-written", lambda: twice(Reduced), pixels, truth_of([reduced(0), reduced(1)])),
    entry(
        "convolved-inputs",
        "hand-written",
        lambda: nn.Sequential(Block(Convolved()), Block(Convolved())),
        pixels,
        truth_of([convolved(0), convolved(1)]),
    ),
    entry("convolutions", "hand-written", ResNet, lambda: {"image": torch.randn(B, 3, 10, 12)}, NONE),
    entry("bottlenecks", "hand-written", lambda: twice(Bottleneck), features, NONE),
    entry("lstm", "hand-written", lambda: Recurrent(nn.LSTM, True), lambda: {"ids": ids()}, NONE),
    entry("gru", "hand-written", lambda: Recurrent(nn.GRU, False), lambda: {"ids": ids()}, NONE),
    entry("mixer", "hand-written", lambda: twice(Mixer), sequence, channel_mlps(0, 1)),
    entry("fourier", "hand-written", lambda: twice(Fourier), sequence, channel_mlps(0, 1)),
    entry("attention-pooling", "hand-written", Pooled, sequence, POOLED),
]
