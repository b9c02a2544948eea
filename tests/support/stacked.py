"""Hand-written stacks whose layers differ in a known way, and the outlines of models."""

from __future__ import annotations

from typing import Any

import torch
import zoo
from torch import Tensor, nn

import peftgraph as pg
from peftgraph.draw import Outline, outline


def outlined(name: str) -> Outline:
    program = zoo.traced(name)
    return outline(program, program.sites)


class Blocks(nn.Module):
    """Pre-norm blocks whose feed-forward widths are given, and which may see only the last `window` positions."""

    def __init__(self, widths: list[int], windows: list[int | None], shared: bool = False) -> None:
        super().__init__()
        self.inner = nn.ModuleList(zoo.NanoBlock(24, 3, width, "eager") for width in widths)
        if shared:
            self.inner = nn.ModuleList([self.inner[0]] * len(widths))
        self.windows = windows
        self.tok = nn.Embedding(17, 24)

    def forward(self, idx: Tensor) -> Tensor:
        x, place = self.tok(idx), torch.arange(idx.shape[1], device=idx.device)
        for block, window in zip(self.inner, self.windows, strict=True):
            x = x + self._attend(block, block.n1(x), place, window)  # pyright: ignore[reportArgumentType]
            x = x + block.proj(nn.functional.gelu(block.fc(block.n2(x))))  # pyright: ignore
        return x

    def _attend(self, block: Any, x: Tensor, place: Tensor, window: int | None) -> Tensor:
        b, s, d = x.shape
        q, k, v = (t.view(b, s, 3, -1).transpose(1, 2) for t in block.mix(x).split(d, dim=2))
        seen = place[None, :] <= place[:, None]
        if window is not None:
            seen = seen & (place[None, :] > place[:, None] - window)
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return block.out(y.transpose(1, 2).reshape(b, s, d))


def blocks(widths: list[int], windows: list[int | None], shared: bool = False) -> Outline:
    program = pg.trace(Blocks(widths, windows, shared), {"idx": torch.randint(0, 17, (3, 7))})
    return outline(program, program.sites)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.last(self.first(pixels).relu().mean((2, 3)))


def convolutions() -> pg.Program:
    return pg.trace(Convolutions(), {"pixels": torch.randn(3, 3, 12, 12)})
