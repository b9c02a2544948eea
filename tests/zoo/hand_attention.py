"""Hand-written attention in its many spellings, one block or two around each, and what is inside."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .entry import Entry, Truth
from .notation import Example, attention, entry, feedforward, thirds

D, H, FFN, B, S, M = 24, 3, 40, 3, 7, 5  # width, heads, hidden width, batch, length, length of a memory
HEAD = D // H


def heads(x: Tensor, count: int = H) -> Tensor:
    """[B, S, count * d] -> [B, count, S, d]."""
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def merge(x: Tensor) -> Tensor:
    """[B, H, S, d] -> [B, S, H * d]."""
    return x.transpose(1, 2).flatten(2)


class Mlp(nn.Module):
    def __init__(self, width: int = D, hidden: int = FFN) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """Pre-norm: an attention and a feed-forward on a residual stream."""

    def __init__(self, mix: nn.Module, post: bool = False) -> None:
        super().__init__()
        self.mix, self.mlp, self.post = mix, Mlp(), post
        self.first, self.second = nn.LayerNorm(D), nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        if self.post:
            x = self.first(x + self.mix(x))
            return self.second(x + self.mlp(x))
        x = x + self.mix(self.first(x))
        return x + self.mlp(self.second(x))


class Fused(nn.Module):
    """One linear for q, k and v, cut by split, written with sdpa or with softmax."""

    def __init__(self, written_out: bool = False) -> None:
        super().__init__()
        self.written_out = written_out
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads(part) for part in self.qkv(x).split(D, dim=-1))
        if not self.written_out:
            return self.out(merge(F.scaled_dot_product_attention(q, k, v, is_causal=True)))
        scores = q @ k.transpose(-2, -1) / HEAD**0.5
        seen = torch.tril(torch.ones(x.shape[1], x.shape[1], dtype=torch.bool))
        return self.out(merge(scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v))


class HeadsFirst(nn.Module):
    """The columns of one linear are ordered [heads, (q, k, v), d]."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (H, 3, HEAD)).permute(3, 0, 2, 1, 4)
        return self.out(merge(F.scaled_dot_product_attention(q, k, v)))


class Einsum(nn.Module):
    """Parameters of shape [D, H, d] and einsum throughout."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Parameter(torch.randn(D, H, HEAD)) for _ in range(3))
        self.o = nn.Parameter(torch.randn(H, HEAD, D))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("bsm,mhd->bshd", x, one) for one in (self.q, self.k, self.v))
        weights = torch.einsum("bqhd,bkhd->bhqk", q, k).mul(HEAD**-0.5).softmax(-1)
        return torch.einsum("bqhd,hdm->bqm", torch.einsum("bhqk,bkhd->bqhd", weights, v), self.o)


class Grouped(nn.Module):
    """`kv` heads of k and v serve all heads of q: 1 is multi-query, 3 of 6 grouped-query."""

    def __init__(self, kv: int, count: int = H, repeat: bool = True) -> None:
        super().__init__()
        self.kv, self.count, self.repeat = kv, count, repeat
        narrow = D // count * kv
        self.q, self.k, self.v, self.o = nn.Linear(D, D), nn.Linear(D, narrow), nn.Linear(D, narrow), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = heads(self.q(x), self.count), heads(self.k(x), self.kv), heads(self.v(x), self.kv)
        if self.repeat:
            k, v = (one.repeat_interleave(self.count // self.kv, dim=1) for one in (k, v))
        return self.o(merge(F.scaled_dot_product_attention(q, k, v, enable_gqa=not self.repeat)))


class FusedMultiQuery(nn.Module):
    """One linear holds all heads of q, then one head of k and one of v."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(D, D + 2 * HEAD), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).split([D, HEAD, HEAD], dim=-1)
        weights = (heads(q) @ k.unsqueeze(1).transpose(-2, -1) / HEAD**0.5).softmax(-1)
        return self.out(merge(weights @ v.unsqueeze(1)))


class SharedKeyValue(nn.Module):
    """One projection is k and v at once."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.o = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        both = heads(self.kv(x))
        return self.o(merge(F.scaled_dot_product_attention(heads(self.q(x)), both, both)))


class NormedQueryKey(nn.Module):
    """q and k are normed head by head after their projections."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(D, D, bias=False) for _ in range(4))
        self.q_norm, self.k_norm = nn.RMSNorm(HEAD), nn.RMSNorm(HEAD)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q_norm(heads(self.q(x))), self.k_norm(heads(self.k(x))), heads(self.v(x))
        return self.o(merge(F.scaled_dot_product_attention(q, k, v)))


class Rotary(nn.Module):
    """The first half of each head's features is turned by position, the rest is not."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(D, D, bias=False) for _ in range(4))

    def turned(self, x: Tensor) -> Tensor:
        angle = torch.arange(x.shape[2], dtype=x.dtype)[:, None] / torch.tensor([1.0, 10.0], dtype=x.dtype)
        left, right, rest = x.split([2, 2, HEAD - 4], dim=-1)
        cos, sin = angle.cos(), angle.sin()
        return torch.cat((left * cos - right * sin, right * cos + left * sin, rest), dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.turned(heads(self.q(x))), self.turned(heads(self.k(x))), heads(self.v(x))
        return self.o(merge(F.scaled_dot_product_attention(q, k, v, is_causal=True)))


class Channels(nn.Module):
    """Attention over channels (XCiT): the scores are [d, d], q and k have unit length over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(H, 1, 1))
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, H, HEAD)).permute(2, 0, 3, 4, 1)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        weights = (q @ k.transpose(-2, -1) * self.temperature).softmax(dim=-1)
        return self.out((weights @ v).permute(0, 3, 1, 2).flatten(2))


class Window(nn.Module):
    """Attention in windows of 4 x 4 on an 8 x 8 grid, shifted by `shift`, with a learned bias by distance."""

    def __init__(self, shift: int) -> None:
        super().__init__()
        self.shift = shift
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.table = nn.Parameter(torch.randn(H, 16, 16))

    def forward(self, x: Tensor) -> Tensor:
        grid = x.unflatten(1, (8, 8))
        if self.shift:
            grid = torch.roll(grid, (-self.shift, -self.shift), (1, 2))
        cut = grid.reshape(-1, 2, 4, 2, 4, D).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, D)
        q, k, v = self.qkv(cut).unflatten(-1, (3, H, HEAD)).permute(2, 0, 3, 1, 4)
        weights = (q * HEAD**-0.5 @ k.transpose(-2, -1) + self.table).softmax(-1)
        mixed = self.out(merge(weights @ v))
        grid = mixed.reshape(-1, 2, 2, 4, 4, D).permute(0, 1, 3, 2, 4, 5).reshape(-1, 8, 8, D)
        if self.shift:
            grid = torch.roll(grid, (self.shift, self.shift), (1, 2))
        return grid.flatten(1, 2)


class Linear(nn.Module):
    """Linear attention, q (k^T v) with positive features: no softmax, and no attention site."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(D, D) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = F.elu(heads(self.q(x))) + 1, F.elu(heads(self.k(x))) + 1, heads(self.v(x))
        total = q @ k.sum(2, keepdim=True).transpose(-2, -1)
        return self.o(merge(q @ (k.transpose(-2, -1) @ v) / total))


def sequence() -> Example:
    return {"input": torch.randn(B, S, D)}


def grid() -> Example:
    return {"input": torch.randn(B, 64, D)}


SEPARATE = {role: f"{role}.weight" for role in "qkvo"}
FUSED = {**thirds("qkv.weight", D), "o": "out.weight"}
MLP = {"up": "up.weight", "down": "down.weight"}
BY_HEAD = [[f"{3 * HEAD * h + HEAD * i}:{3 * HEAD * h + HEAD * (i + 1)}" for h in range(H)] for i in range(3)]

# name -> the attention module and its roles
SPELLINGS = {
    "fused": (Fused, FUSED),
    "fused-softmax": (lambda: Fused(written_out=True), FUSED),
    "fused-heads-first": (
        HeadsFirst,
        {role: f"qkv.weight[{','.join(BY_HEAD[i])}]" for i, role in enumerate("qkv")} | {"o": "out.weight"},
    ),
    "einsum": (Einsum, {role: role for role in "qkvo"}),
    "multi-query": (lambda: Grouped(1), SEPARATE),
    "grouped-query": (lambda: Grouped(3, 6), SEPARATE),
    "grouped-query-sdpa": (lambda: Grouped(3, 6, repeat=False), SEPARATE),
    "fused-multi-query": (
        FusedMultiQuery,
        {
            "q": f"qkv.weight[0:{D}]",
            "k": f"qkv.weight[{D}:{D + HEAD}]",
            "v": f"qkv.weight[{D + HEAD}:{D + 2 * HEAD}]",
            "o": "out.weight",
        },
    ),
    "shared-kv": (SharedKeyValue, {"q": "q.weight", "k": "kv.weight", "v": "kv.weight", "o": "o.weight"}),
    "qk-norm": (NormedQueryKey, SEPARATE),
    "partial-rotary": (Rotary, SEPARATE),
    "channels": (Channels, FUSED),
}


def stack_truth(roles: dict[str, str], layers: int = 2, post: bool = False) -> Truth:
    layout = "post" if post else "pre"
    return Truth(
        tuple(attention(f"{i}.mix", layer=i, layout=layout, **roles) for i in range(layers)),
        tuple(feedforward(f"{i}.mlp", layer=i, layout=layout, **MLP) for i in range(layers)),
    )


def interleaved(first: type[nn.Module], second: type[nn.Module]) -> nn.Module:
    return nn.Sequential(*(Block((first, second)[i % 2]()) for i in range(4)))


def windows() -> nn.Module:
    return nn.Sequential(*(Block(Window(2 * (i % 2))) for i in range(4)))


MIXED = Truth(
    tuple(attention(f"{i}.mix", layer=i, layout="pre", **FUSED) for i in (0, 2)),
    tuple(feedforward(f"{i}.mlp", layer=i, layout="pre", **MLP) for i in range(4)),
)

ENTRIES: list[Entry] = [
    entry(
        f"{name}{'-post' if post else ''}",
        "hand-written",
        lambda make=make, post=post: nn.Sequential(Block(make(), post), Block(make(), post)),
        sequence,
        stack_truth(roles, post=post),
    )
    for name, (make, roles) in SPELLINGS.items()
    for post in ((False, True) if name == "fused" else (False,))
] + [
    entry("windows-shifted", "hand-written", windows, grid, stack_truth(FUSED, layers=4)),
    entry(
        "window-and-global",
        "hand-written",
        lambda: nn.Sequential(*(Block(Fused() if i % 2 else Window(0)) for i in range(4))),
        grid,
        stack_truth(FUSED, layers=4),
    ),
    entry("softmax-and-linear", "hand-written", lambda: interleaved(Fused, Linear), sequence, MIXED),
]
