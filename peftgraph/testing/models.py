"""Small models by hand, with distinct sizes, of the kinds that passes are applied to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

WIDTH, HEADS, HIDDEN, WORDS = 12, 3, 20, 23


@dataclass(frozen=True)
class SmallModel:
    """A model to check passes on.

    Attributes:
        name: in messages.
        model: it is not changed; the laws are checked on a copy in float64.
        inputs: keyword inputs of a call.
    """

    name: str
    model: nn.Module
    inputs: Mapping[str, Any]


class Attention(nn.Module):
    """Attention over a memory, which is the sequence itself by default."""

    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        self.causal = causal
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        memory = x if memory is None else memory
        read = ((self.q, x), (self.k, memory), (self.v, memory))
        q, k, v = (layer(value).unflatten(-1, (HEADS, WIDTH // HEADS)).transpose(1, 2) for layer, value in read)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.o(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A block with norms before its sublayers, or after their residual adds."""

    def __init__(self, causal: bool = False, cross: bool = False, post: bool = False) -> None:
        super().__init__()
        self.post = post
        self.attention = Attention(causal)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.cross = Attention() if cross else None
        self.norm3 = nn.LayerNorm(WIDTH) if cross else None

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        if self.post:
            x = self.norm1(x + self.attention(x))
            return self.norm2(x + self.down(nn.functional.gelu(self.up(x))))
        x = x + self.attention(self.norm1(x))
        if self.cross is not None and self.norm3 is not None:
            x = x + self.cross(self.norm3(x), memory)
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class Decoder(nn.Module):
    """Two pre-norm blocks with causal attention, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList([Block(causal=True), Block(causal=True)])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Encoder(nn.Module):
    """Two post-norm blocks, with positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(16, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.blocks = nn.ModuleList([Block(post=True), Block(post=True)])

    def forward(self, input_ids: Tensor) -> Tensor:
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.norm(self.embed(input_ids) + self.places(places))
        for block in self.blocks:
            x = block(x)
        return x


class EncoderDecoder(nn.Module):
    """A block that reads the input, and one that writes and attends to it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.encoder, self.decoder = Block(), Block(causal=True, cross=True)
        self.norm1, self.norm2, self.head = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS)

    def forward(self, input_ids: Tensor, decoder_input_ids: Tensor) -> Tensor:
        memory = self.norm1(self.encoder(self.embed(input_ids)))
        return self.head(self.norm2(self.decoder(self.embed(decoder_input_ids), memory)))


class Vision(nn.Module):
    """Patches of pictures, one row before them, two blocks, and a head on that row."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 4, 4)
        self.first = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.patches(pixel_values).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(x.shape[0], -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


def _words(*names: str) -> dict[str, Tensor]:
    return {name: torch.randint(WORDS, (2, 7 - 2 * i)) for i, name in enumerate(names)}


MODELS: Mapping[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Tensor]]]] = {
    "decoder": (Decoder, lambda: _words("input_ids")),
    "encoder": (Encoder, lambda: _words("input_ids")),
    "encoder_decoder": (EncoderDecoder, lambda: _words("input_ids", "decoder_input_ids")),
    "vision": (Vision, lambda: {"pixel_values": torch.randn(2, 3, 8, 12)}),
}


@cache
def small_model(name: str) -> SmallModel:
    """Return a built-in model, always with the same weights and inputs."""
    build, inputs = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SmallModel(name, build(), inputs())
