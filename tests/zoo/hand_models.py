"""Hand-written models around attention: memories, several streams, shared blocks, experts, convolutions."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .entry import Entry, Expected, Truth
from .hand_attention import FFN, FUSED, MLP, SEPARATE, B, Block, D, Fused, M, Mlp, S, heads, merge, sequence
from .notation import Example, attention, entry, feedforward


class Mixed(nn.Module):
    """Attention of `x` to `memory`, four linears."""

    def __init__(self, width: int = D, memory: int = D) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(width, width), nn.Linear(width, width)
        self.k, self.v = nn.Linear(memory, width), nn.Linear(memory, width)

    def forward(self, x: Tensor, memory: Tensor | None = None, causal: bool = False) -> Tensor:
        source = x if memory is None else memory
        q, k, v = heads(self.q(x)), heads(self.k(source)), heads(self.v(source))
        return self.o(merge(F.scaled_dot_product_attention(q, k, v, is_causal=causal)))


class NanoGPT(nn.Module):
    """Embeddings of tokens and positions, two blocks, a head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(31, D), nn.Embedding(16, D)
        self.blocks = nn.ModuleList([Block(Fused()), Block(Fused())])
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, 31, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class DecoderLayer(nn.Module):
    """Self attention, attention to a memory, feed-forward; post-norm as in the original Transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.across, self.mlp = Mixed(), Mixed(), Mlp()
        self.norms = nn.ModuleList(nn.LayerNorm(D) for _ in range(3))

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        x = self.norms[0](x + self.own(x, causal=True))
        x = self.norms[1](x + self.across(x, memory))
        return self.norms[2](x + self.mlp(x))


class Seq2Seq(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(31, D), nn.Embedding(29, D)
        self.encoder = nn.ModuleList([Block(Fused(), post=True), Block(Fused(), post=True)])
        self.decoder = nn.ModuleList([DecoderLayer(), DecoderLayer()])
        self.head = nn.Linear(D, 29)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        memory, x = self.source(source), self.target(target)
        for block in self.encoder:
            memory = block(memory)
        for block in self.decoder:
            x = block(x, memory)
        return self.head(x)


class Shared(nn.Module):
    """ALBERT's scheme: one block runs three times, behind a narrow embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.widen, self.block = nn.Embedding(31, 10), nn.Linear(10, D), Block(Fused(), post=True)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.widen(self.tokens(ids))
        for _ in range(3):
            x = self.block(x)
        return x


class Experts(nn.Module):
    """Two of four experts for each token, all computed, and one that every token passes, with a gate of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.route, self.gate = nn.Linear(D, 4, bias=False), nn.Linear(D, 1, bias=False)
        self.experts, self.shared = nn.ModuleList(Swish(20) for _ in range(4)), Swish(28)

    def forward(self, x: Tensor) -> Tensor:
        scores, chosen = self.route(x).softmax(-1).topk(2, dim=-1)
        weights = torch.zeros(*x.shape[:-1], 4, dtype=x.dtype).scatter(-1, chosen, scores)
        y = torch.sigmoid(self.gate(x)) * self.shared(x)
        for i, expert in enumerate(self.experts):
            y = y + weights[..., i : i + 1] * expert(x)
        return y


class Swish(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(D, hidden, bias=False), nn.Linear(D, hidden, bias=False)
        self.down = nn.Linear(hidden, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix, self.experts = Mixed(), Experts()
        self.first, self.second = nn.RMSNorm(D), nn.RMSNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.first(x), causal=True)
        return x + self.experts(self.second(x))


class GatedMlp(nn.Module):
    """GEGLU: one linear, value first, gate second."""

    def __init__(self, width: int = D) -> None:
        super().__init__()
        self.both, self.down = nn.Linear(width, 2 * FFN), nn.Linear(FFN, width)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.both(x).chunk(2, dim=-1)
        return self.down(value * F.gelu(gate))


class Parallel(nn.Module):
    """Attention and feed-forward read one norm and are added at once."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix, self.mlp = nn.LayerNorm(D), Fused(), GatedMlp()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.mix(y) + self.mlp(y)


class Modulated(nn.Module):
    """DiT's block: a condition gives scale, shift and gate of both sublayers (AdaLN)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.LayerNorm(D, elementwise_affine=False) for _ in range(2))
        self.mix, self.mlp, self.condition = Fused(), Mlp(), nn.Linear(D, 6 * D)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        parts = self.condition(F.silu(condition)).unsqueeze(1).chunk(6, dim=-1)
        shift, scale, gate, shift2, scale2, gate2 = parts
        x = x + gate * self.mix(self.first(x) * (1 + scale) + shift)
        return x + gate2 * self.mlp(self.second(x) * (1 + scale2) + shift2)


class Diffusion(nn.Module):
    """Patches, a time embedding by an MLP, modulated blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(4, D, 2, stride=2)
        self.time = nn.Sequential(nn.Linear(16, D), nn.SiLU(), nn.Linear(D, D))
        self.blocks = nn.ModuleList([Modulated(), Modulated()])
        self.out = nn.Linear(D, 16)

    def forward(self, image: Tensor, time: Tensor) -> Tensor:
        angle = time[:, None] * torch.exp(-torch.arange(8, dtype=image.dtype))
        condition = self.time(torch.cat((angle.sin(), angle.cos()), dim=-1))
        x = self.patch(image).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x, condition)
        return self.out(x)


class Joint(nn.Module):
    """SD3's block: two streams with weights of their own attend to both, put one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(D) for _ in range(4))
        self.image, self.text = (nn.ModuleDict({name: nn.Linear(D, D) for name in "qkvo"}) for _ in range(2))
        self.mlps = nn.ModuleList([Mlp(), Mlp()])

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.norms[0](x), self.norms[1](y)
        q, k, v = (torch.cat((heads(self.image[n](a)), heads(self.text[n](b))), dim=2) for n in "qkv")
        mixed = merge(F.scaled_dot_product_attention(q, k, v))
        x = x + self.image["o"](mixed[:, : x.shape[1]])
        y = y + self.text["o"](mixed[:, x.shape[1] :])
        return x + self.mlps[0](self.norms[2](x)), y + self.mlps[1](self.norms[3](y))


class TwoStreams(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Joint(), Joint()])

    def forward(self, input: Tensor, memory: Tensor) -> Tensor:
        x, y = input, memory
        for block in self.blocks:
            x, y = block(x, y)
        return torch.cat((x, y), dim=1)


class Latents(nn.Module):
    """Perceiver: learned latents attend to the input, then to themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(4, D))
        self.read, self.norms = Mixed(D, 14), nn.ModuleList([nn.LayerNorm(D), nn.LayerNorm(14)])
        self.mlp, self.norm = Mlp(), nn.LayerNorm(D)
        self.blocks = nn.ModuleList([Block(Fused()), Block(Fused())])

    def forward(self, input: Tensor) -> Tensor:
        x = self.latents.expand(input.shape[0], -1, -1)
        x = x + self.read(self.norms[0](x), self.norms[1](input))
        x = x + self.mlp(self.norm(x))
        for block in self.blocks:
            x = block(x)
        return x


def ids(high: int = 31, length: int = S) -> Tensor:
    return torch.randint(0, high, (B, length))


def block_truth(stem: str, layer: int, layout: str = "pre") -> tuple[Expected, Expected]:
    """The attention and the feed-forward of a `Block(Fused())`."""
    return (
        attention(f"{stem}.mix", layer=layer, layout=layout, **FUSED),
        feedforward(f"{stem}.mlp", layer=layer, layout=layout, **MLP),
    )


def truth_of(pairs: list[tuple[Expected, ...]]) -> Truth:
    """Every attention comes first in its tuple; what has ffn roles is a feed-forward."""
    every = [one for pair in pairs for one in pair]
    fed = [any(part.role.startswith("ffn") for part in one.parts) for one in every]
    return Truth(
        tuple(one for one, is_ffn in zip(every, fed, strict=True) if not is_ffn),
        tuple(one for one, is_ffn in zip(every, fed, strict=True) if is_ffn),
    )


def decoder_layer(i: int) -> tuple[Expected, ...]:
    return (
        attention(f"decoder.{i}.own", layer=i, layout="post", **SEPARATE),
        attention(f"decoder.{i}.across", layer=i, kind="cross", layout="post", **SEPARATE),
        feedforward(f"decoder.{i}.mlp", layer=i, layout="post", **MLP),
    )


def mixture_layer(i: int) -> tuple[Expected, ...]:
    names = [f"experts.{n}" for n in range(4)] + ["shared"]
    fed = {role: " + ".join(f"{name}.{role}.weight" for name in names) for role in ("gate", "up", "down")}
    return (
        attention(f"{i}.mix", layer=i, layout="pre", **SEPARATE),
        feedforward(f"{i}.experts", layer=i, layout="pre", **fed),
    )


def parallel_layer(i: int) -> tuple[Expected, ...]:
    gated = {"up": f"both.weight[0:{FFN}]", "gate": f"both.weight[{FFN}:{2 * FFN}]", "down": "down.weight"}
    return (
        attention(f"{i}.mix", layer=i, layout="pre", **FUSED),
        feedforward(f"{i}.mlp", layer=i, layout="pre", **gated),
    )


def joint_layer(i: int) -> tuple[Expected, ...]:
    roles = {role: f"image.{role}.weight + text.{role}.weight" for role in "qkvo"}
    return (
        attention(f"blocks.{i}", layer=i, layout="pre", **roles),
        feedforward(f"blocks.{i}.mlps.0", layer=i, layout="pre", **MLP),
        feedforward(f"blocks.{i}.mlps.1", layer=i, layout="pre", **MLP),
    )


LATENTS = truth_of(
    [
        (
            attention("read", kind="cross", layout="pre", **SEPARATE),
            feedforward("mlp", layout="pre", **MLP),
        ),
        block_truth("blocks.0", 0),
        block_truth("blocks.1", 1),
    ]
)
SHARED = Truth(
    (attention("block.mix", uses=3, layout="post", **FUSED),), (feedforward("block.mlp", uses=3, layout="post", **MLP),)
)
SEQ2SEQ = truth_of([*(block_truth(f"encoder.{i}", i, "post") for i in (0, 1)), *map(decoder_layer, (0, 1))])


def image() -> Example:
    return {"image": torch.randn(B, 4, 10, 10), "time": torch.rand(B)}


def two() -> Example:
    return {"input": torch.randn(B, S, D), "memory": torch.randn(B, M, D)}


ENTRIES: list[Entry] = [
    entry(
        "nanogpt",
        "hand-written",
        NanoGPT,
        lambda: {"ids": ids()},
        truth_of([block_truth(f"blocks.{i}", i) for i in (0, 1)]),
    ),
    entry("seq2seq", "hand-written", Seq2Seq, lambda: {"source": ids(), "target": ids(29, M)}, SEQ2SEQ),
    entry("shared-block", "hand-written", Shared, lambda: {"ids": ids()}, SHARED),
    entry(
        "experts-list",
        "hand-written",
        lambda: nn.Sequential(Mixture(), Mixture()),
        sequence,
        truth_of([mixture_layer(0), mixture_layer(1)]),
    ),
    entry(
        "parallel-geglu",
        "hand-written",
        lambda: nn.Sequential(Parallel(), Parallel()),
        sequence,
        truth_of([parallel_layer(0), parallel_layer(1)]),
    ),
    entry(
        "diffusion-adaln", "hand-written", Diffusion, image, truth_of([block_truth(f"blocks.{i}", i) for i in (0, 1)])
    ),
    entry("joint-streams", "hand-written", TwoStreams, two, truth_of([joint_layer(0), joint_layer(1)])),
    entry("latents", "hand-written", Latents, lambda: {"input": torch.randn(B, S, 14)}, LATENTS),
]
