"""Computes a graph's operators in float64 without a whole weight in float64: matrices are read in pieces.

A stored tensor is a value that has not been read yet. The products of a matrix take its pieces one after the other; any
other operator gets it whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from peftgraph.folding.exact_values import ExactValues

aten = torch.ops.aten
VALUES = 1 << 17  # of a piece: in float64 it fits the cache of a core
Pieces = Iterator[tuple[int, int, Tensor]]


class Unread(Protocol):
    """A tensor whose float64 values are read when they are needed."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape."""
        ...

    @property
    def is_floating(self) -> bool:
        """Whether it holds real numbers."""
        ...

    def pieces(self) -> Pieces:
        """Yield parts of a matrix: the axis that is cut, where the part starts on it, and the part."""
        ...

    def whole(self) -> Tensor:
        """Return all values."""
        ...


@dataclass(frozen=True)
class Stored:
    """A tensor of a table."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def is_floating(self) -> bool:
        return self.tensor.is_floating_point()

    def pieces(self) -> Pieces:
        rows, width = self.tensor.shape
        size = max(1, VALUES // max(1, width))
        for first in range(0, rows, size):
            yield 0, first, self.tensor[first : first + size].double()

    def whole(self) -> Tensor:
        return wide(self.tensor)


@dataclass(frozen=True)
class Exact:
    """The exact new values of a tensor."""

    values: ExactValues
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.program.table[self.name].tensor.shape)

    @property
    def is_floating(self) -> bool:
        return True

    def pieces(self) -> Pieces:
        return self.values.pieces(self.name)

    def whole(self) -> Tensor:
        return self.values.whole(self.name)


@dataclass(frozen=True)
class Turned:
    """The transpose of a matrix."""

    matrix: Unread

    @property
    def shape(self) -> tuple[int, ...]:
        return self.matrix.shape[::-1]

    @property
    def is_floating(self) -> bool:
        return self.matrix.is_floating

    def pieces(self) -> Pieces:
        return ((1 - axis, first, piece.t()) for axis, first, piece in self.matrix.pieces())

    def whole(self) -> Tensor:
        return self.matrix.whole().t()


def wide(value: Any) -> Any:
    """Return a value with its tensors in float64 where they are floating."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    return pytree.tree_map_only(Tensor, wide, value) if isinstance(value, list | tuple | dict) else value


def compute(node: fx.Node, values: Callable[[fx.Node], Any]) -> Any:
    """Compute the value of a call in float64.

    Args:
        node: the call.
        values: returns the value of an operand, which may be unread.
    """
    args, kwargs = map_arg((node.args, dict(node.kwargs)), values)
    form = FORMS.get(node.target)
    if form is not None and not kwargs and _is_matrix(args[form[0]] if len(args) > form[0] else None):
        found = form[1](*args)
        if found is not None:
            return found
    assert callable(node.target)
    return wide(node.target(*whole(args), **whole(kwargs)))


def whole(value: Any) -> Any:
    """Return arguments in which every unread tensor was read."""
    if isinstance(value, Stored | Exact | Turned):
        return value.whole()
    if isinstance(value, list | tuple):
        return type(value)([whole(one) for one in value])
    if isinstance(value, Mapping):
        return {key: whole(one) for key, one in value.items()}
    return value


def _is_matrix(value: Any) -> bool:
    return isinstance(value, Stored | Exact | Turned) and value.is_floating and len(value.shape) == 2


def _product(x: Any, matrix: Unread) -> Tensor | None:
    """Compute x W for W (I, O)."""
    if not isinstance(x, Tensor) or x.dim() < 1:
        return None
    y = x.new_zeros(*x.shape[:-1], matrix.shape[1])
    for axis, first, piece in matrix.pieces():
        if axis == 1:
            y[..., first : first + piece.shape[1]] = x @ piece
        else:
            y += x[..., first : first + piece.shape[0]] @ piece
    return y


def _linear(x: Any, matrix: Unread, bias: Any = None) -> Tensor | None:
    y = _product(x, Turned(matrix))
    return y if y is None or bias is None else y + whole(bias)


def _addmm(bias: Any, x: Any, matrix: Unread) -> Tensor | None:
    y = _product(x, matrix)
    return y if y is None else y + whole(bias)


def _embedding(table: Unread, numbers: Any, *_: Any) -> Tensor | None:
    """Look rows up in a table (V, D)."""
    y = torch.zeros(*numbers.shape, table.shape[1], dtype=torch.float64, device=numbers.device)
    for axis, first, piece in table.pieces():
        if axis == 1:
            y[..., first : first + piece.shape[1]] = piece[numbers]
            continue
        here = (numbers >= first) & (numbers < first + piece.shape[0])
        y[here] = piece[numbers[here] - first]
    return y


def _transposed(matrix: Unread, first: int, second: int) -> Unread:
    return matrix if first % 2 == second % 2 else Turned(matrix)


def _permuted(matrix: Unread, order: Sequence[int]) -> Unread:
    return matrix if order[0] % 2 == 0 else Turned(matrix)


# operator -> which operand is the matrix, and how it is computed with one that is unread; None: with all of it.
FORMS: dict[Any, tuple[int, Callable[..., Any]]] = {
    aten.linear.default: (1, _linear),
    aten.mm.default: (1, _product),
    aten.matmul.default: (1, _product),
    aten.addmm.default: (2, _addmm),
    aten.embedding.default: (0, _embedding),
    aten.t.default: (0, Turned),
    aten.transpose.int: (0, _transposed),
    aten.permute.default: (0, _permuted),
}
