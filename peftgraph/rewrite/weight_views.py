"""Windows on stored parameters: the same (out, in) matrix whether it is a Linear, a Conv1D, a slice of a fused
projection, a tied embedding or a stack of experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peftgraph.ir.tensor_table import TensorTable
from peftgraph.sites import Columns, MatrixAxes, Site

Read = Callable[[str], Tensor]


@dataclass(frozen=True)
class View:
    """A window on one stored parameter.

    Attributes:
        parameter: the stored parameter's dotted name.
        transposed: stored (in, out).
        window: the stored output features it covers; None = all.
        vector: it is a bias (O,) and not a matrix (O, I).
        experts: size of a leading expert dimension, (E, O, I) and (E, O); None when there is none.
        axes: which stored axes are features, if it is not stored as a plain matrix.
    """

    parameter: str
    transposed: bool = False
    window: Columns | None = None
    vector: bool = False
    experts: int | None = None
    axes: MatrixAxes | None = None

    def shape(self, full: Tensor) -> tuple[int, ...]:
        """Return the window's shape: (O, I), (E, O, I), (O,) or (E, O)."""
        sizes = list(self._oriented(full).shape)
        if self.window is not None:
            sizes[self._axis] = len(self.window)
        return tuple(int(size) for size in sizes)

    def get(self, full: Tensor) -> Tensor:
        """Return the window of a stored tensor, in (out, in) orientation."""
        oriented = self._oriented(full)
        return (
            oriented if self.window is None else oriented.index_select(self._axis, self.window.index().to(full.device))
        )

    def put(self, full: Tensor, value: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return a copy of the stored tensor with `value` in the window, in `dtype` or the stored one; the rest is
        kept."""
        kind = dtype or full.dtype
        value = value.to(device=full.device, dtype=kind)
        if self.window is not None:
            index = self.window.index().to(full.device)
            value = self._oriented(full).to(kind).index_copy(self._axis, index, value)
        return self._restored(value, full).clone(memory_format=torch.contiguous_format)

    def stored(self, full: Tensor, value: Tensor) -> Tensor | None:
        """Return `value` in the layout of the stored tensor, in its own memory; None where the window is not all of
        that."""
        if self.window is not None or value.shape != self._oriented(full).shape:
            return None
        return self._restored(value, full)

    def overlaps(self, other: View) -> bool:
        """Tell whether two views share stored values."""
        if self.parameter != other.parameter:
            return False
        if self.window is None or other.window is None:
            return True
        return not set(self.window).isdisjoint(other.window)

    @property
    def _axis(self) -> int:
        return -1 if self.vector else -2

    def _oriented(self, full: Tensor) -> Tensor:
        if self.vector:
            return full
        if self._is_plain(full):
            return full.t() if self.transposed else full
        axes = self._axes(full)
        stack = [axes.sizes[axis] for axis in axes.stacked]
        return full.reshape(axes.sizes).permute(axes.order).reshape(*stack, *axes.shape)

    def _restored(self, matrix: Tensor, full: Tensor) -> Tensor:
        """Return the inverse of `_oriented`."""
        if self.vector:
            return matrix
        if self._is_plain(full):
            return matrix.t() if self.transposed else matrix
        axes = self._axes(full)
        back = [axes.order.index(axis) for axis in range(len(axes.sizes))]
        return matrix.reshape([axes.sizes[axis] for axis in axes.order]).permute(back).reshape(full.shape)

    def _is_plain(self, full: Tensor) -> bool:
        """Check whether a tensor is stored as a matrix."""
        return self.axes is None and self.experts is None and full.dim() == 2

    def _axes(self, full: Tensor) -> MatrixAxes:
        return self.axes or MatrixAxes.plain([int(size) for size in full.shape], self.transposed, self.experts)

    def axes_of(self, full: Tensor) -> MatrixAxes | None:
        """Return which axes of a stored tensor are features; None where it is a matrix, or a stack of matrices, as it
        is."""
        plain = self.axes is None and full.dim() == (2 if self.experts is None else 3)
        return None if plain else self._axes(full)

    def __str__(self) -> str:
        return self.parameter if self.window is None else f"{self.parameter}[{self.window}]"


@dataclass(frozen=True, eq=False)
class ParameterValue:
    """A view of a stored parameter with its current value, in the dtype that folding accumulates in.

    `Match.weight`, `Match.bias` and `Match.rows` return them. `Rule.fold` maps each one that changes to its new value.

    Attributes:
        view: which part of which stored parameter.
        value: (O, I) or (E, O, I) for a weight, (O,) or (E, O) for a bias, whatever the stored layout.
    """

    view: View
    value: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the value."""
        return tuple(int(size) for size in self.value.shape)


def weight_view(site: Site) -> View | None:
    """Return the window of a site's weight."""
    if site.weight is None:
        return None
    weight = site.weight
    return View(weight.parameter, weight.transposed, weight.window, experts=weight.experts, axes=weight.axes)


def rows_view(site: Site, numbers: Sequence[int]) -> View:
    """Return the window on rows (N, D) of the table that a site reads as a whole: rows that an embedding looks up, or
    output features of a projection."""
    assert site.weight is not None
    assert site.weight.window is None
    transposed = site.weight.transposed != (site.role == "embedding")
    return View(site.weight.parameter, transposed, Columns.of(numbers))


def scale_view(site: Site) -> View | None:
    """Return the view of the scale of a norm; None when it has none."""
    return None if site.scale is None else View(site.scale, vector=True)


def bias_view(site: Site) -> View | None:
    """Return the window of a site's bias."""
    if site.bias is None:
        return None
    experts = None if site.weight is None else site.weight.experts
    return View(site.bias.parameter, window=site.bias.window, vector=True, experts=experts)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which folding computes: float64 for float64, float32 for anything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def bind(view: View, table: TensorTable, precision: torch.dtype | None = None) -> ParameterValue:
    """Return `view` with its current values in `table`, in `precision`, by default the dtype in which folding
    accumulates."""
    full = table.value(view.parameter).detach()
    return ParameterValue(view, view.get(full).to(precision or accumulation_dtype(full.dtype)))
