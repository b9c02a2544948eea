"""Cuts stored weights into chunks that fold on their own: some output features, of one expert where it is a stack.

A fold that computes each output feature from that feature alone is computed chunk by chunk: the values in the wide
dtype fit a processor's cache, and a stack of experts is never wide as a whole. The chunks depend on the stored shape
alone, so that every way of folding computes the same products and gives the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from peftgraph.rewrite.weight_views import View
from peftgraph.sites import Columns, Site

VALUES = 1 << 17  # of a chunk: three chunks in float32 fit the second-level cache of a core
FEWEST = 64  # output features of a chunk; products with very few rows use other routines, which round differently


@dataclass(frozen=True)
class Chunk:
    """A range of output features of a stored weight and of its bias.

    Attributes:
        first, last: the range of stored output features; `last` is not part of it.
        expert: that they belong to; None where the weight is no stack.
    """

    first: int
    last: int
    expert: int | None = None

    def slice(self, full: Tensor, view: View) -> Tensor:
        """Return the chunk of a stored tensor, in its own layout and sharing its memory.

        Args:
            full: the tensor.
            view: says what its axes mean.
        """
        if self.expert is not None:
            full = full.narrow(0, self.expert, 1)
        return full.narrow(feature_axis(full, view), self.first, self.last - self.first)

    def narrow_site(self, site: Site) -> Site | None:
        """Return the site restricted to the chunk; None where it owns nothing of the chunk."""
        assert site.weight is not None
        if site.weight.window is None and site.weight.experts is None:
            return site  # all output features are its own, those of the chunk too
        window = self._window(site.weight.window)
        if window is not None and not window.runs:
            return None
        experts = None if site.weight.experts is None else 1
        bias = None if site.bias is None else replace(site.bias, window=window)
        return replace(site, weight=replace(site.weight, window=window, experts=experts), bias=bias)

    def slice_parameter(self, value: Tensor, axis: int | None, window: Columns | None) -> Tensor:
        """Return the chunk of an edit's parameter.

        Args:
            value: the parameter.
            axis: its axis of the site's own output features; None where it has none.
            window: the stored features that the site owns; None for all.
        """
        if self.expert is not None:
            value = value.narrow(0, self.expert, 1)
        if axis is None:
            return value
        found = [value.narrow(axis, start, length) for start, length in self._positions(window)]
        return found[0] if len(found) == 1 else torch.cat(found, axis)

    def _window(self, window: Columns | None) -> Columns | None:
        """Return the features of a window inside the chunk, counted from its first; None for all of them."""
        if window is None:
            return None
        runs = tuple((start - self.first, stop - self.first) for start, stop, _ in self._common(window))
        return None if runs == ((0, self.last - self.first),) else Columns(runs)

    def _positions(self, window: Columns | None) -> list[tuple[int, int]]:
        """Return the positions of the chunk's features among a site's own: starts and lengths."""
        if window is None:
            return [(self.first, self.last - self.first)]
        return [(position, stop - start) for start, stop, position in self._common(window)]

    def _common(self, window: Columns) -> Iterator[tuple[int, int, int]]:
        """Yield the contiguous runs that a window shares with the chunk, and where each starts in the window."""
        position = 0
        for start, stop in window.runs:
            low, high = max(start, self.first), min(stop, self.last)
            if low < high:
                yield low, high, position + low - start
            position += stop - start


def feature_axis(full: Tensor, view: View) -> int:
    """Return the axis of output features of a stored tensor."""
    if view.experts is None and full.dim() > 2:
        return 0
    return full.dim() - (1 if view.vector or view.transposed else 2)


def chunks_of(full: Tensor, view: View) -> list[Chunk]:
    """Return the chunks of a stored weight, in order.

    Args:
        full: the weight; its values are not read.
        view: says what its axes mean; its window is ignored.
    """
    *_, features, width = replace(view, window=None).shape(full)
    size = max(FEWEST, VALUES // max(1, width))
    starts = range(0, max(1, features // size) * size, size)  # the last chunk is longer, and none is short
    ends = [*starts[1:], features]
    experts = [None] if view.experts is None else range(view.experts)
    return [Chunk(first, last, expert) for expert in experts for first, last in zip(starts, ends, strict=True)]
