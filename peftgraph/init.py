"""Initialisers of new parameters: each fills a tensor in place, drawing from torch's global generator."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor
from torch import nn as _nn


def zeros(tensor: Tensor) -> None:
    """All zero."""
    tensor.zero_()


def ones(tensor: Tensor) -> None:
    """All one."""
    tensor.fill_(1.0)


def kaiming(tensor: Tensor) -> None:
    """Uniform in +-1/sqrt(fan_in), fan_in the last dimension: kaiming_uniform with a = sqrt(5), as loralib starts A."""
    bound = 1 / math.sqrt(tensor.shape[-1])
    _nn.init.uniform_(tensor, -bound, bound)


def normal(std: float) -> Callable[[Tensor], None]:
    """Normal with mean 0 and standard deviation `std`."""

    def fill(tensor: Tensor) -> None:
        _nn.init.normal_(tensor, std=std)

    return fill
