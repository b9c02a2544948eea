"""Products in which each row of a batch has a matrix of its own, by the way that is fastest for their shapes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from peftgraph.serving.product_costs import Way, costs_on

STATIC_LIMIT = 8  # up to so many matrices, a graph that cannot choose at run time multiplies by all of them


def linear_by_row(x: Tensor, weights: Tensor, rows: Tensor, axis: int = 0, transposed: bool = False) -> Tensor:
    """Compute x W^T, where each entry of the batch has one of M matrices.

    Args:
        x: (..., I); its axis `axis` has n entries for each entry of the batch, those of one beside one another.
        weights: (M, O, I), or (M, I, O) if `transposed`.
        rows: (B,) int64, the matrix of each entry of the batch.
        axis: of the batch; not the last.
        transposed: the layout of `weights`.

    Returns:
        (..., O).
    """
    moved = x if axis == 0 else x.movedim(axis, 0)
    shape = moved.shape
    x_BTI = moved.reshape(rows.shape[0], -1, shape[-1]) if shape[0] != 1 else _repeated(moved, rows.shape[0])
    y_BTO = WAYS[_way(x_BTI, weights, transposed)](x_BTI, weights, rows, transposed)
    leading = (rows.shape[0], *shape[1:-1]) if shape[0] == 1 else shape[:-1]
    y = y_BTO.reshape(*leading, y_BTO.shape[-1])
    return y if axis == 0 else y.movedim(0, axis)


def _repeated(x: Tensor, batch: int | torch.SymInt) -> Tensor:
    """Return a value that all entries of the batch share, (1, ..., I), for each of them."""
    return x.reshape(1, -1, x.shape[-1]).expand(batch, -1, -1)


def _way(x_BTI: Tensor, weights: Tensor, transposed: bool) -> Way:
    """Choose the way by shapes; where they are symbols, by what they cannot change."""
    count, first, second = weights.shape
    out, inner = (second, first) if transposed else (first, second)
    if not all(isinstance(size, int) for size in weights.shape):
        return "gathered"
    if not isinstance(x_BTI.shape[0], int) or not isinstance(x_BTI.shape[1], int) or torch.compiler.is_compiling():
        return "masked" if count <= STATIC_LIMIT and min(out, inner) * count <= max(out, inner) else "gathered"
    return costs_on(x_BTI.device).cheapest(x_BTI.shape[0], x_BTI.shape[1], count, out, inner)


def gathered(x_BTI: Tensor, weights: Tensor, rows: Tensor, transposed: bool) -> Tensor:
    """Copy each entry's matrix, then multiply them as a batch."""
    own = weights.index_select(0, rows)
    return torch.bmm(x_BTI, own if transposed else own.transpose(1, 2))


def masked(x_BTI: Tensor, weights: Tensor, rows: Tensor, transposed: bool) -> Tensor:
    """Multiply by all matrices at once: a narrow result is computed for all, of which each entry takes its own; a
    narrow x is written beside zeros, where the entry's own matrix is."""
    batch, length, inner = x_BTI.shape
    count = weights.shape[0]
    own_BM = F.one_hot(rows, count).to(x_BTI.dtype)
    if transposed:
        wide = x_BTI.unsqueeze(2) * own_BM[:, None, :, None]
        return (wide.reshape(batch * length, count * inner) @ weights.reshape(count * inner, -1)).reshape(
            batch, length, weights.shape[2]
        )
    out = weights.shape[1]
    y = F.linear(x_BTI.reshape(batch * length, inner), weights.reshape(count * out, inner))
    return torch.einsum("btmo,bm->bto", y.reshape(batch, length, count, out), own_BM)


def segments(x_BTI: Tensor, weights: Tensor, rows: Tensor, transposed: bool) -> Tensor:
    """Multiply the entries of each matrix together, in the order of the matrices."""
    order = rows.argsort(stable=True)
    back = torch.empty_like(order)
    back[order] = torch.arange(order.shape[0], device=order.device)
    sizes = torch.bincount(rows, minlength=weights.shape[0]).tolist()
    pieces = x_BTI.index_select(0, order).split(sizes)
    parts = [
        torch.matmul(one, weight if transposed else weight.T)
        for one, weight in zip(pieces, weights, strict=True)
        if one.shape[0]
    ]
    return torch.cat(parts).index_select(0, back)


WAYS: dict[Way, Callable[[Tensor, Tensor, Tensor, bool], Tensor]] = {
    "gathered": gathered,
    "masked": masked,
    "segments": segments,
}
