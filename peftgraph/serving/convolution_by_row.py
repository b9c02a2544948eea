"""Convolutions in which each row of a batch has a kernel of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
FUNCTIONS: dict[Any, Callable[..., Tensor]] = {
    aten.conv1d.default: torch.conv1d,
    aten.conv2d.default: torch.conv2d,
    aten.conv3d.default: torch.conv3d,
}


def convolve_by_row(
    convolution: Any,
    x: Tensor,
    kernels: Tensor,
    rows: Tensor,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """Convolve each entry of a batch with its own kernel, as one convolution whose groups are the entries.

    Args:
        convolution: aten.conv1d, conv2d or conv3d.
        x: (B, C, ...).
        kernels: (M, O, C / groups, ...).
        rows: (B,) int64, the kernel of each entry.
        stride: of the convolution.
        padding: of the convolution.
        dilation: of the convolution.
        groups: of the convolution.

    Returns:
        (B, O, ...).
    """
    batch, channels, *sizes = x.shape
    own = kernels.index_select(0, rows)
    together = own.reshape(batch * kernels.shape[1], *kernels.shape[2:])
    beside = x.reshape(1, batch * channels, *sizes)
    y = FUNCTIONS[convolution](beside, together, None, stride, padding, dilation, batch * groups)
    return y.reshape(batch, kernels.shape[1], *y.shape[2:])
