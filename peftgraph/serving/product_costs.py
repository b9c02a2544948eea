"""What the ways to multiply each row by a matrix of its own cost on a machine."""

from __future__ import annotations

import time
from collections.abc import Callable
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


# Fixed, so that a choice, and with it the last bits of a result, is the same in each process. For a CPU: measured on a
# core of a server, in float32. For a GPU: assumed, since calls dominate there; not measured.
TYPICAL = {"cpu": ProductCosts(25.0, 60.0, 250.0, 3.0), "cuda": ProductCosts(0.05, 0.1, 1.0, 8.0)}
_known: dict[str, ProductCosts] = {}


def costs_on(device: torch.device) -> ProductCosts:
    """Return the costs on a kind of device: those that were measured in this process, or typical ones."""
    return _known.get(device.type) or TYPICAL.get(device.type, TYPICAL["cuda"])


def use_costs(device: torch.device | str, costs: ProductCosts | None) -> None:
    """Choose ways by these costs on a kind of device from now on; None for typical ones."""
    kind = torch.device(device).type
    if costs is None:
        _known.pop(kind, None)
    else:
        _known[kind] = costs


def measure_costs(device: torch.device | str = "cpu") -> ProductCosts:
    """Measure the costs on this machine, in some tenths of a second; `use_costs` then chooses by them.

    Example:
        >>> use_costs("cpu", measure_costs("cpu"))
    """
    place = torch.device(device)
    x, weight = torch.ones(256, 512, device=place), torch.ones(512, 256, device=place)
    x_BTI, weights = torch.ones(64, 16, 512, device=place), torch.ones(64, 512, 16, device=place)
    small, rows = torch.ones(4, device=place), torch.arange(64, device=place)
    call = _microseconds(place, lambda: torch.neg(small))
    dense = _microseconds(place, lambda: torch.mm(x, weight)) - call
    batched = _microseconds(place, lambda: torch.bmm(x_BTI, weights)) - call
    copied = _microseconds(place, lambda: weights.index_select(0, rows)) - call
    multiplied = 256 * 512 * 256 / 1e6, 64 * 16 * 512 * 16 / 1e6
    least = 1e-3  # a timer's step is no cost
    return ProductCosts(
        max(dense, least) / multiplied[0],
        max(batched, least) / multiplied[1],
        max(copied, least) / (weights.numel() / 1e6),
        max(call, least),
    )


def _microseconds(device: torch.device, run: Callable[[], object], rounds: int = 20) -> float:
    """Return the shortest time of a call, in microseconds."""
    times: list[float] = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return 1e6 * min(times)
