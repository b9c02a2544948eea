"""Parts of a stored weight that fold on their own: some of its output features, of one expert where it is a stack.

A fold that makes each output feature from that feature alone is computed part by part: what is in the wide dtype at a
time fits a processor's cache, and a stack of experts is never wide as a whole. Where the parts end depends on the
stored shape alone, so that every way of folding computes the same products and gives the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from peftgraph.rewrite.weight_views import View
from peftgraph.sites import Columns, Site

VALUES = 1 << 17  # of a part: three of it in float32 fit the second-level cache of a core
FEWEST = 64  # output features of a part; products with very few rows take other routines, and round otherwise


@dataclass(frozen=True)
class Part:
    """Some output features of a stored weight and of what lies beside it.

    Attributes:
        first, last: the first of the stored output features, and the first after them.
        expert: the expert they belong to; None where the weight is no stack.
    """

    first: int
    last: int
    expert: int | None = None

    def of(self, full: Tensor, view: View) -> Tensor:
        """The part of a stored tensor, in its own layout and sharing its memory.

        Args:
            full: the tensor.
            view: says which of its axes are which.
        """
        if self.expert is not None:
            full = full.narrow(0, self.expert, 1)
        axis = (
            0 if view.experts is None and full.dim() > 2 else full.dim() - (1 if view.vector or view.transposed else 2)
        )
        return full.narrow(axis, self.first, self.last - self.first)

    def site(self, site: Site) -> Site | None:
        """A site whose stored tensors are the part's; None where it owns nothing of the part."""
        assert site.weight is not None
        window = self._window(site.weight.window)
        if window is not None and not window.runs:
            return None
        experts = None if site.weight.experts is None else 1
        bias = None if site.bias is None else replace(site.bias, window=window)
        return replace(site, weight=replace(site.weight, window=window, experts=experts), bias=bias)

    def of_parameter(self, value: Tensor, axis: int | None, window: Columns | None) -> Tensor:
        """The part of an edit's parameter.

        Args:
            value: the parameter.
            axis: its axis of the site's own output features; None where it has none.
            window: the stored features that the site owns.
        """
        if self.expert is not None:
            value = value.narrow(0, self.expert, 1)
        if axis is None:
            return value
        found = [value.narrow(axis, start, length) for start, length in self._places(window)]
        return found[0] if len(found) == 1 else torch.cat(found, axis)

    def _window(self, window: Columns | None) -> Columns | None:
        if window is None:
            return None
        runs = tuple((start - self.first, stop - self.first) for start, stop, _ in self._common(window))
        return None if runs == ((0, self.last - self.first),) else Columns(runs)

    def _places(self, window: Columns | None) -> list[tuple[int, int]]:
        """Where the part's features stand among a site's own: starts and lengths."""
        if window is None:
            return [(self.first, self.last - self.first)]
        return [(place, stop - start) for start, stop, place in self._common(window)]

    def _common(self, window: Columns) -> Iterator[tuple[int, int, int]]:
        """The features that a window shares with the part, and the place of each run's first in the window."""
        place = 0
        for start, stop in window.runs:
            low, high = max(start, self.first), min(stop, self.last)
            if low < high:
                yield low, high, place + low - start
            place += stop - start


def parts_of(full: Tensor, view: View) -> list[Part]:
    """The parts of a stored weight, in order.

    Args:
        full: the weight; its values are not read.
        view: says which of its axes are which; its window is not looked at.
    """
    *_, features, width = replace(view, window=None).shape(full)
    size = max(FEWEST, VALUES // max(1, width))
    starts = range(0, max(1, features // size) * size, size)  # the last part is longer, and none is short
    ends = [*starts[1:], features]
    experts = [None] if view.experts is None else range(view.experts)
    return [Part(first, last, expert) for expert in experts for first, last in zip(starts, ends, strict=True)]
