"""Small hand-written models, traced, and the graphs that laws are drawn over."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import peftgraph as pg

B, S, D, H = 3, 7, 12, 20


class Gated(nn.Module):
    """w(act(g x) * (u x)): a gated unit without a residual add, which no built-in role covers."""

    def __init__(self, act: Callable[[Tensor], Tensor] = F.silu, swap: bool = False) -> None:
        super().__init__()
        self.g, self.u, self.w = nn.Linear(D, H), nn.Linear(D, H, bias=False), nn.Linear(H, D)
        self.act, self.swap = act, swap

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.act(self.g(x)), self.u(x)
        return self.w(b * a if self.swap else a * b)


class Fused(nn.Module):
    """One projection whose halves go different ways: the first through a depthwise convolution, the second gates."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.out = nn.Linear(D, 2 * H), nn.Linear(H, D)
        self.conv = nn.Conv1d(H, H, 3, groups=H, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        u, z = self.both(x).chunk(2, dim=-1)
        u = self.conv(u.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)
        return x + self.out(F.silu(u) * torch.sigmoid(z))


def traced(model: nn.Module, example: Tensor | None = None) -> pg.Program:
    """A program of a model that reads (B, S, D)."""
    return pg.trace(model, (torch.randn(B, S, D) if example is None else example,))


@pytest.fixture(scope="session")
def gated() -> pg.Program:
    """Two gated units in a row."""
    torch.manual_seed(0)
    return traced(nn.Sequential(Gated(), Gated()))


@pytest.fixture(scope="session")
def fused() -> pg.Program:
    """The fused unit, twice, in float64."""
    torch.manual_seed(0)
    return traced(nn.Sequential(Fused(), Fused()).double(), torch.randn(B, S, D, dtype=torch.float64))


@pytest.fixture
def trace() -> Callable[..., pg.Program]:
    """trace(model): its program."""
    return traced


@pytest.fixture
def gated_with() -> Callable[..., nn.Module]:
    """gated_with(act, swap): a gated unit."""
    return Gated
