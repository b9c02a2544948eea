"""Attention with a prefix, from the equation, inside the original models. For tests only."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Rows = tuple[Tensor, Tensor]  # P_K and P_V, (L, G F) each


def with_prefix(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float, rows: Rows) -> Tensor:
    """(1 - a) softmax(q k^T + bias) v + a softmax(q P_K^T) P_V, a the share of the exponentials on the prefix.

    q (B, H, S, F), k and v (B, H, T, F), bias broadcast to (B, H, S, T).
    """
    heads, features = k.shape[1], k.shape[3]
    by_head = [r.view(len(r), -1, features).transpose(0, 1) for r in rows]  # G L F
    key, value = (r.repeat_interleave(heads // len(r), 0) for r in by_head)
    scores = q @ k.transpose(-2, -1) * scale + bias
    own = torch.einsum("bhsf,hlf->bhsl", q, key) * scale
    share = torch.sigmoid(own.logsumexp(-1) - scores.logsumexp(-1)).unsqueeze(-1)
    return (1 - share) * (scores.softmax(-1) @ v) + share * torch.einsum("bhsl,hlf->bhsf", own.softmax(-1), value)


@contextmanager
def attending(attend: Callable[..., Tensor], rows: Sequence[Rows]) -> Iterator[None]:
    """Every fused attention called inside is `attend(q, k, v, bias, scale, the next of rows)`, without dropout."""
    left, kept = iter(rows), torch.nn.functional.scaled_dot_product_attention

    def fused(q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
              scale: float | None = None, enable_gqa: bool = False) -> Tensor:  # fmt: skip
        assert dropout_p == 0
        bias = q.new_zeros(q.shape[-2], k.shape[-2])
        if is_causal:
            bias = bias.masked_fill(torch.ones_like(bias, dtype=torch.bool).triu(1), -math.inf)
        if attn_mask is not None:
            closed = attn_mask.dtype == torch.bool
            bias = q.new_zeros(attn_mask.shape).masked_fill(~attn_mask, -math.inf) if closed else attn_mask
        if enable_gqa:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        return attend(q, k, v, bias, q.shape[-1] ** -0.5 if scale is None else scale, next(left))

    torch.nn.functional.scaled_dot_product_attention = fused
    try:
        yield
    finally:
        torch.nn.functional.scaled_dot_product_attention = kept
    assert next(left, None) is None, "fewer attentions were called than have rows"


@contextmanager
def disentangled(rows: Sequence[Rows], heads: int) -> Iterator[None]:
    """The same inside DeBERTa-v2, which writes its attention out: of the four products of each attention the first is
    q k^T and the last weights the values, (B H, S, F) each; what it adds to the scores falls on its own keys alone."""
    left, kept = iter(rows), (torch.bmm, torch.nn.functional.softmax)
    products: list[Tensor] = []
    scores: list[Tensor] = []

    def product(a: Tensor, b: Tensor) -> Tensor:
        products.append(a)
        own = kept[0](a, b)
        if len(products) < 4:
            return own
        q = products[0].view(-1, heads, *products[0].shape[1:])
        key, value = (r.view(len(r), heads, -1).transpose(0, 1) for r in next(left))  # H L F
        scale = torch.sqrt(torch.tensor(q.shape[-1], dtype=torch.float) * 3).to(q.dtype)
        prefix = torch.einsum("bhsf,hlf->bhsl", q, key) / scale
        share = torch.sigmoid(prefix.logsumexp(-1) - scores.pop().logsumexp(-1)).unsqueeze(-1)
        products.clear()
        mixed = share * torch.einsum("bhsl,hlf->bhsf", prefix.softmax(-1), value)
        return (1 - share).flatten(0, 1) * own + mixed.flatten(0, 1)

    def softmax(x: Tensor, dim: int) -> Tensor:
        scores.append(x)
        return kept[1](x, dim=dim)

    torch.bmm, torch.nn.functional.softmax = product, softmax
    try:
        yield
    finally:
        torch.bmm, torch.nn.functional.softmax = kept
    assert next(left, None) is None, "fewer attentions were called than have rows"
