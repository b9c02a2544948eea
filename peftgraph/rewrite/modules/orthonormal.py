"""Matrices with orthonormal rows, computed from unconstrained parameters, so that any optimizer can train them."""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx

from peftgraph.ir.builder import Builder

aten = torch.ops.aten


def orthonormalise(op: Builder, x_RI: fx.Node) -> fx.Node:
    """Make the rows of x (R, I), R at most I, orthonormal in order (Gram-Schmidt, computed by Householder's QR).

    Row r is the component of x's row r outside the span of the earlier rows, at unit length, so orthonormal rows stay
    unchanged. Computed in float32 where the parameters are narrower. The gradient is exact where the rows are
    independent.
    """
    qr = op.call(aten.linalg_qr.default, op.call(aten.t.default, op.cast(x_RI, "wide")))
    q_IR, triangle_RR = (op.call(operator.getitem, qr, i) for i in (0, 1))
    signs_R = op.call(aten.sign.default, op.call(aten.diagonal.default, triangle_RR))
    return op.cast(op.call(aten.t.default, op.mul(q_IR, signs_R)), "dtype")


def orthonormalise_tensor(x_RI: Tensor) -> Tensor:
    """Make the rows of a tensor (R, I) orthonormal, bit for bit as `orthonormalise` does in the graph."""
    q_IR, triangle_RR = torch.linalg.qr(x_RI.to(torch.promote_types(x_RI.dtype, torch.float32)).t())
    return (q_IR * triangle_RR.diagonal().sign()).t().to(x_RI.dtype)
