"""What data says about a site: statistics of its inputs and of the gradient of its weight."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal

from torch import Tensor

Statistic = Literal["covariance", "activations", "gradient", "fisher"]


@dataclass(frozen=True)
class SiteStatistics:
    """Holds the statistics of one site; None for what was not asked for.

    Attributes:
        rows: how many inputs of the site were seen.
        covariance: the mean of x x^T over all inputs, (I, I), in float32 or wider; the mean of x is not taken off.
        activations: inputs that were drawn at random, (N, I).
        gradient: the mean gradient of the loss by the weight, over batches, (O, I).
        fisher: the mean of the squared gradient, over batches, (O, I).
    """

    rows: int = 0
    covariance: Tensor | None = None
    activations: Tensor | None = None
    gradient: Tensor | None = None
    fisher: Tensor | None = None

    def updated(self, other: SiteStatistics) -> SiteStatistics:
        """Return the statistics of both; those of `other` where both have one."""
        own = {item.name: getattr(other, item.name) for item in fields(self)}
        return replace(
            self,
            **{name: value for name, value in own.items() if value is not None and name != "rows"},
            rows=other.rows or self.rows,
        )
