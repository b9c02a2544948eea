"""Makes the inputs of regions: random values in float64, with few rows where the sizes of a call are free."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from peftgraph.ir.program import ProgramData

ROWS = 8  # of an input over all its free sizes, beyond which they are made smaller
FEW = 4  # what a free size is then


class Unusable(Exception):
    """A region cannot be computed on inputs of its own."""


class RegionInputs:
    """Random values in the place of those that a graph computes.

    Args:
        program: its example has the values of whole inputs.
        rows: the numbers of rows of tables that lookups must contain, because the fold changes them alone.
        few: whether free sizes are made smaller than the example's.
    """

    def __init__(self, program: ProgramData, rows: Sequence[int], few: bool) -> None:
        placeholders = program.graph.find_nodes(op="placeholder")
        example = dict(zip((node.name for node in placeholders), program.example, strict=True))
        sizes = _fewer(program) if few else {}
        self._rows = rows
        self._device = program.table.device
        self._symbols: dict[Any, int] = {}
        self._example: dict[str, Tensor] = {}
        for node in placeholders:
            value = example[node.name]
            for axis, dim in enumerate(node.meta["val"].shape):
                symbol = _symbol(dim)
                if symbol is not None:
                    value = value.narrow(axis, 0, sizes.get(str(symbol), value.shape[axis]))
                    self._symbols[symbol] = value.shape[axis]
            self._example[node.name] = value
        self._known: dict[Any, int | None] = {}
        self._generator = torch.Generator().manual_seed(0)

    def given(self, node: fx.Node) -> Tensor:
        """Return the example's value of an input of the graph."""
        value = self._example[node.name].to(self._device)
        return value.double() if value.is_floating_point() else value

    def random(self, value: Tensor) -> Tensor | None:
        """Return random numbers in the place of a value; None where they cannot stand for it, because it contains no
        real numbers, or its sizes depend on values.

        Raises:
            Unusable: it would have no entries.
        """
        shape = [self._size(dim) for dim in value.shape]
        if not value.is_floating_point() or None in shape:
            return None
        if any(size is not None and size < 1 for size in shape):
            raise Unusable("an input of a region would be empty")
        return torch.randn(shape, generator=self._generator, dtype=torch.float64).to(self._device)  # pyright: ignore

    def numbers(self, value: Tensor, table: int) -> Tensor | None:
        """Return row numbers for a lookup in a table of so many rows; None where the sizes depend on values."""
        shape = [self._size(dim) for dim in value.shape]
        if None in shape:
            return None
        count = math.prod(shape)  # pyright: ignore
        chosen = torch.randint(table, (count,), generator=self._generator)
        wanted = torch.tensor([row for row in self._rows if row < table][:count], dtype=torch.long)
        chosen[: len(wanted)] = wanted
        return chosen.reshape(shape).to(self._device)  # pyright: ignore

    def _size(self, dim: Any) -> int | None:
        """Return a size as a number; None where it is not determined by the sizes of inputs."""
        if isinstance(dim, int):
            return dim
        expression = dim.node.expr
        if expression not in self._known:
            known = expression.subs(self._symbols)
            self._known[expression] = None if known.free_symbols else int(known)
        return self._known[expression]


def _symbol(dim: Any) -> Any | None:
    """Return the symbol that a size consists of."""
    if isinstance(dim, int):
        return None
    return dim.node.expr if dim.node.expr.is_Symbol else None


def _fewer(program: ProgramData) -> dict[str, int]:
    """Return smaller values of the free sizes, by symbol; none where the example is small or conditions tie sizes."""
    shapes = [node.meta["val"].shape for node in program.graph.find_nodes(op="placeholder")]
    free = {str(symbol) for shape in shapes for dim in shape if (symbol := _symbol(dim)) is not None}
    tied = {str(one) for shape in shapes for dim in shape if not isinstance(dim, int) and _symbol(dim) is None
            for one in dim.node.expr.free_symbols}  # fmt: skip
    names: dict[str, str] = {}
    most = 0
    for spec, shape, value in zip(program.signature.inputs, shapes, program.example, strict=True):
        own = {
            str(_symbol(dim)): size for dim, size in zip(shape, value.shape, strict=True) if _symbol(dim) is not None
        }
        most = max(most, math.prod(own.values()) if own else 0)
        names |= {str(_symbol(dim)): str(name) for dim, name in zip(shape, spec.dims, strict=True)}
    if most <= ROWS or program.signature.conditions:
        return {}
    sizes = {str(_symbol(dim)): int(size) for shape, value in zip(shapes, program.example, strict=True)
             for dim, size in zip(shape, value.shape, strict=True)}  # fmt: skip
    low = {symbol: program.signature.ranges.get(names[symbol], (0, None))[0] for symbol in free}
    return {symbol: max(low[symbol], min(sizes[symbol], FEW)) for symbol in free - tied}
