"""The Fastfood transform: a random projection of a short vector onto a long one, in n log n operations.

    P(v) = (H G Pi H B v)[:n] / sqrt(n sum G^2)

v is padded with zeros to N, the next power of two of n and of its own length; H is the Walsh-Hadamard matrix of +-1, B
holds random signs, Pi a random permutation and G standard normal numbers.
Source: Le, Sarlos and Smola, Fastfood (2013); arXiv 2012.13255, section 3; rabeehk/compacter, intrinsic.py (norm).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

aten = torch.ops.aten
RADIX = 32  # a transform of N values is a product with H of this size along each digit of their numbers
Call = Callable[..., Any]


@dataclass(frozen=True)
class FastfoodDraw:
    """The random parts of one transform, of N entries each, and what is the same for all.

    Attributes:
        signs: B.
        order: Pi.
        normal: G.
        hadamard: H of the size RADIX.
        divisor: sqrt(n sum G^2).
    """

    signs: Tensor
    order: Tensor
    normal: Tensor
    hadamard: Tensor
    divisor: float


def draw_fastfood(seed: int, name: str, size: int, length: int, device: torch.device) -> FastfoodDraw:
    """Draw the random parts of the transform onto one tensor; the same on every machine.

    NumPy's RandomState is used, whose stream is frozen across its versions.

    Args:
        seed: of the model.
        name: of the tensor, so that each has a transform of its own.
        size: n, the number of its entries.
        length: of v.
        device: where the parts are to be.
    """
    total = padded_length(size, length)
    if device.type == "meta" or isinstance(torch.empty(0), FakeTensor):  # sizes are all that is wanted
        empty = torch.empty(total, device=device)
        return FastfoodDraw(empty, empty.to(torch.int64), empty, torch.empty(RADIX, RADIX, device=device), 1.0)
    words = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    stream = np.random.RandomState(np.frombuffer(words, dtype="<u4").astype(np.uint32))
    signs = torch.from_numpy(stream.randint(0, 2, total) * 2 - 1).to(torch.float32)
    order = torch.from_numpy(stream.permutation(total))
    numbers = stream.standard_normal(total).astype(np.float32)
    divisor = math.sqrt(size * float((numbers.astype(np.float64) ** 2).sum()))
    normal = torch.from_numpy(numbers)
    return FastfoodDraw(signs.to(device), order.to(device), normal.to(device), _hadamard().to(device), divisor)


def fastfood(call: Call, v: Any, length: int, size: int, draw: Any) -> Any:
    """Compute P(v), (n,); with `Builder.call` as `call` in a graph, with `run` on tensors.

    Args:
        call: takes an aten overload and its operands.
        v: (length,).
        length: of v.
        size: n.
        draw: what `draw_fastfood` gave, in the dtype of v; its tensors may be nodes of the graph.
    """
    total = padded_length(size, length)
    padded = call(aten.constant_pad_nd.default, v, [0, total - length]) if total > length else v
    mixed = walsh_hadamard(call, call(aten.mul.Tensor, padded, draw.signs), total, draw.hadamard)
    picked = call(aten.index_select.default, mixed, 0, draw.order)
    mixed = walsh_hadamard(call, call(aten.mul.Tensor, picked, draw.normal), total, draw.hadamard)
    return call(aten.div.Tensor, call(aten.slice.Tensor, mixed, 0, 0, size), draw.divisor)


def walsh_hadamard(call: Call, x: Any, total: int, hadamard: Any) -> Any:
    """Compute H x of `total` values, a power of two: a product along each digit of their numbers, to the base RADIX."""
    left = total
    while left > 1:
        radix = min(RADIX, left)
        block = hadamard  # a smaller matrix is the first block of a larger one
        if radix < RADIX:
            block = call(aten.slice.Tensor, call(aten.slice.Tensor, hadamard, 0, 0, radix), 1, 0, radix)
        rows = call(aten.view.default, x, [total // radix, radix])
        # the last digit goes to the front, so that after all digits the order is the first one
        x = call(aten.reshape.default, call(aten.t.default, call(aten.matmul.default, rows, block)), [total])
        left //= radix
    return x


def padded_length(size: int, length: int) -> int:
    """Return N: the next power of two of both."""
    return 1 << (max(size, length) - 1).bit_length()


def run(target: Call, *operands: Any) -> Any:
    """Call an aten overload on tensors."""
    return target(*operands)


def _hadamard() -> Tensor:
    """Return H of the size RADIX, by Sylvester's construction."""
    found = torch.ones(1, 1)
    while len(found) < RADIX:
        found = torch.cat([torch.cat([found, found], 1), torch.cat([found, -found], 1)])
    return found
