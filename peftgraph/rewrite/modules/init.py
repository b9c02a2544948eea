"""Initialisers of new parameters: each fills a tensor in place, using torch's global generator."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch import nn as _nn

from peftgraph.rewrite.match import Match


def zeros(tensor: Tensor) -> None:
    """Fill with zeros."""
    tensor.zero_()


def ones(tensor: Tensor) -> None:
    """Fill with ones."""
    tensor.fill_(1.0)


def kaiming(tensor: Tensor) -> None:
    """Uniform in +-1/sqrt(fan_in), fan_in the last dimension: kaiming_uniform with a = sqrt(5), as loralib starts A."""
    bound = 1 / math.sqrt(tensor.shape[-1])
    _nn.init.uniform_(tensor, -bound, bound)


def uniform(bound: float) -> Callable[[Tensor], None]:
    """Uniform in +-bound."""

    def fill(tensor: Tensor) -> None:
        _nn.init.uniform_(tensor, -bound, bound)

    return fill


def normal(std: float) -> Callable[[Tensor], None]:
    """Return an initialiser: normal with mean 0 and standard deviation `std`."""

    def fill(tensor: Tensor) -> None:
        _nn.init.normal_(tensor, std=std)

    return fill


def truncated_normal(std: float) -> Callable[[Tensor], None]:
    """Return an initialiser: normal with mean 0 and standard deviation `std`, truncated at two standard deviations."""

    def fill(tensor: Tensor) -> None:
        _nn.init.trunc_normal_(tensor, std=std, a=-2 * std, b=2 * std)

    return fill


def constant(value: float) -> Callable[[Tensor], None]:
    """Return an initialiser: every entry is `value`."""

    def fill(tensor: Tensor) -> None:
        tensor.fill_(value)

    return fill


def orthonormal(tensor: Tensor) -> None:
    """Orthonormal rows (R, I), R at most I: a subspace drawn uniformly."""
    tensor.copy_(_nn.init.orthogonal_(torch.empty_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))))


def xavier_uniform(gain: float = 1.0) -> Callable[[Tensor], None]:
    """Uniform in +-gain sqrt(6 / (m + n)) for matrices (..., m, n)."""

    def fill(tensor: Tensor) -> None:
        bound = gain * math.sqrt(6 / (tensor.shape[-2] + tensor.shape[-1]))
        _nn.init.uniform_(tensor, -bound, bound)

    return fill


def xavier_normal(gain: float = 1.0) -> Callable[[Tensor], None]:
    """Return an initialiser: normal with standard deviation gain sqrt(2 / (m + n)) for matrices (..., m, n)."""

    def fill(tensor: Tensor) -> None:
        _nn.init.normal_(tensor, std=gain * math.sqrt(2 / (tensor.shape[-2] + tensor.shape[-1])))

    return fill


def principal(
    weight: Tensor, rank: int, scale: float = 1.0
) -> tuple[Callable[[Tensor], None], Callable[[Tensor], None]]:
    """Return initialisers of A (R, I) and B (O, R) that make `scale` B A the best rank-R approximation of `weight` (O,
    I).

    A = sqrt(S / scale) V^T and B = U sqrt(S / scale), from the R largest singular values; leading dimensions are
    batches. There is no randomness, and the singular values are computed once, when the first of the two is filled.
    Source: arXiv 2404.02948, equations 2 and 3.
    """

    def factors() -> tuple[Tensor, Tensor]:
        u_OK, s_K, v_KI = torch.linalg.svd(weight, full_matrices=False)
        root_R = (s_K[..., :rank] / scale).sqrt()
        return root_R.unsqueeze(-1) * v_KI[..., :rank, :], u_OK[..., :rank] * root_R.unsqueeze(-2)

    return _pair(factors)


def principal_inputs(m: Match, rank: int) -> Callable[[Tensor], None]:
    """Return an initialiser of A (R, I): the R directions in which the inputs of a site are largest, each of length 1.

    They are the eigenvectors of the mean of x x^T with the largest eigenvalues, which `Program.calibrate` collects.
    Source: arXiv 2410.07170, section 3 (EVA), without its redistribution of ranks.
    """

    def fill(tensor: Tensor) -> None:
        _, vectors_II = torch.linalg.eigh(m.statistic("covariance").double())
        tensor.copy_(vectors_II.mT.flip(0)[:rank])

    return fill


def orthonormal_columns(weight: Tensor, rank: int) -> tuple[Callable[[Tensor], None], Callable[[Tensor], None]]:
    """Return initialisers of A (R, I) and B (O, R): the first rows of U and columns of Q, where Q U = `weight` (O, I).

    Q has orthonormal columns and U is upper triangular; leading dimensions are batches. There is no randomness.
    Source: arXiv 2406.01775, algorithm 1.
    """

    def factors() -> tuple[Tensor, Tensor]:
        q_OK, u_KI = torch.linalg.qr(weight)
        return u_KI[..., :rank, :], q_OK[..., :rank]

    return _pair(factors)


def _pair(factors: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Callable[[Tensor], None], Callable[[Tensor], None]]:
    """Return initialisers that fill A and B with two factors, which are computed once."""
    known = cache(factors)

    def down(tensor: Tensor) -> None:
        tensor.copy_(known()[0])

    def up(tensor: Tensor) -> None:
        tensor.copy_(known()[1])

    return down, up
