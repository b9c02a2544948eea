"""What the ways to multiply each row by a matrix of its own cost on a machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Way = Literal["gathered", "masked", "segments"]


@dataclass(frozen=True)
class ProductCosts:
    """The costs of parts of products, in microseconds.

    Attributes:
        dense: of a million multiplications of one large product.
        batched: of a million multiplications of a product for each entry of a batch.
        copied: of copying a million values.
        call: of one operator.
    """

    dense: float
    batched: float
    copied: float
    call: float

    def of(self, way: Way, batch: int, length: int, matrices: int, out: int, inner: int) -> float:
        """Estimate one way, for x (batch, length, inner) and that many matrices (out, inner), in microseconds."""
        product, values = batch * length * out * inner / 1e6, batch * length * (out + inner) / 1e6
        narrow = batch * length * matrices * min(out, inner) / 1e6
        if way == "gathered":
            return self.batched * product + self.copied * batch * out * inner / 1e6 + 2 * self.call
        if way == "masked":
            return self.dense * matrices * product + self.copied * 2 * narrow + 4 * self.call
        present = min(batch, matrices)
        return self.dense * product + self.copied * 2 * values + (8 + 3 * present) * self.call

    def cheapest(self, batch: int, length: int, matrices: int, out: int, inner: int) -> Way:
        """Return the way of the least estimated cost."""
        ways: tuple[Way, ...] = ("gathered", "masked") if out * inner == 0 else ("gathered", "masked", "segments")
        return min(ways, key=lambda way: self.of(way, batch, length, matrices, out, inner))


# Measured on a core of a server's CPU with float32, and on a GPU, whose calls are what costs.
TYPICAL = {"cpu": ProductCosts(25.0, 60.0, 250.0, 3.0), "cuda": ProductCosts(0.05, 0.1, 1.0, 8.0)}
_known: dict[str, ProductCosts] = {}


def costs_on(device: torch.device) -> ProductCosts:
    """Return the costs on a kind of device: those that were measured in this process, or typical ones."""
    return _known.get(device.type) or TYPICAL.get(device.type, TYPICAL["cuda"])


def use_costs(device: torch.device, costs: ProductCosts) -> None:
    """Choose ways by these costs on a kind of device from now on."""
    _known[device.type] = costs
