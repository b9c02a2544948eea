"""Softmaxes that are written out make attention as the operator does; what only looks like one makes none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from peftgraph.sites import Sites

Find = Callable[[nn.Module, object], Sites]
D = 12


class Block(nn.Module):
    """A residual attention whose weights come from `squash(scores)`."""

    def __init__(self, squash: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(D, D) for _ in range(4))
        self.squash = squash

    def forward(self, x: Tensor) -> Tensor:
        scores = self.a(x) @ self.b(x).transpose(-1, -2) / D**0.5
        return x + self.d(self.squash(scores) @ self.c(x))


def plain(z: Tensor) -> Tensor:
    return torch.exp(z) / torch.exp(z).sum(-1, keepdim=True)


def stable(z: Tensor) -> Tensor:
    e = torch.exp(z - z.amax(-1, keepdim=True))
    return e / (e.sum(dim=-1, keepdim=True) + 1e-9)


def clamped(z: Tensor) -> Tensor:
    e = (z - z.amax(-1, keepdim=True)).float().exp()
    return e / e.sum(-1, keepdim=True).clamp_min(1e-6).expand_as(e)


def logarithmic(z: Tensor) -> Tensor:
    return torch.exp(z - torch.logsumexp(z, -1, keepdim=True))


def shared(z: Tensor) -> Tensor:
    e = torch.exp(z)
    return e / e.sum(-1, keepdim=True)


class Masked(torch.autograd.Function):
    """A softmax with a backward of its own, as DeBERTa's code once had it."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, mask: Tensor, axis: int) -> Tensor:
        p = torch.softmax(z.masked_fill(mask, -1e9), axis).masked_fill(mask, 0)
        ctx.save_for_backward(p)
        return p

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None]:
        (p,) = ctx.saved_tensors
        return p * (slope - (slope * p).sum(-1, keepdim=True)), None, None


def kept(z: Tensor) -> Tensor:
    return cast("Tensor", Masked.apply(z, z > 9, -1))


def essence(sites: Sites) -> list[tuple[object, ...]]:
    return [(s.role, s.path, s.layer, s.kind, s.columns, s.weight) for s in sites if s.role != "bias"]


@pytest.mark.parametrize("squash", [stable, clamped, logarithmic, shared, kept])
def test_written_out_or_not_the_sites_are_the_same(find: Find, squash: Callable[[Tensor], Tensor]) -> None:
    example = (torch.randn(3, 7, D),)
    found = essence(find(Block(squash), example))
    assert found == essence(find(Block(lambda z: torch.softmax(z, -1)), example))
    assert [row[1] for row in found if str(row[0]) in ("attention.q", "attention.k", "attention.v")] == ["a", "b", "c"]


def test_the_axis_of_the_sum_tells_the_keys(find: Find) -> None:
    def across(z: Tensor) -> Tensor:
        e = torch.exp(z)
        return (e / e.sum(-2, keepdim=True)).transpose(-1, -2)

    sites = find(Block(across), (torch.randn(3, 7, D),))
    assert [site.path for site in sites.require("attention.q")] == ["b"]
    assert [site.path for site in sites.require("attention.k")] == ["a"]


def test_a_share_of_something_else_is_no_softmax(find: Find) -> None:
    for squash in (
        lambda z: torch.sigmoid(z) / torch.sigmoid(z).sum(-1, keepdim=True),
        lambda z: torch.exp(z) / torch.exp(-z).sum(-1, keepdim=True),
        lambda z: torch.exp(z) / torch.exp(z).mean(-1, keepdim=True),
    ):
        assert not find(Block(squash), (torch.randn(3, 7, D),)).select("attention.core")
