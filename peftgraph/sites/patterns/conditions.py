"""Conditions on sizes: `size(w, 2) == 1`, `size(up, -1) >= 2 * size(x, -1)`."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

RELATIONS: Final[Mapping[str, Callable[[float, float], bool]]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}


@dataclass(frozen=True)
class Quantity:
    """`factor` times the size of `variable` along `axis`; `factor` alone where no variable is named."""

    factor: int | float
    variable: str = ""
    axis: int = 0

    def value(self, shapes: Mapping[str, tuple[int, ...]]) -> float | None:
        """Return the number it comes to; None where the value has no such axis."""
        if not self.variable:
            return self.factor
        shape = shapes[self.variable]
        return self.factor * shape[self.axis] if -len(shape) <= self.axis < len(shape) else None

    def __str__(self) -> str:
        if not self.variable:
            return repr(self.factor)
        size = f"size({self.variable}, {self.axis})"
        return size if self.factor == 1 else f"{self.factor!r} * {size}"


@dataclass(frozen=True)
class Condition:
    """A relation between two quantities, of the traced example's sizes."""

    left: Quantity
    relation: str
    right: Quantity

    @property
    def variables(self) -> tuple[str, ...]:
        """The variables it speaks of."""
        return tuple(side.variable for side in (self.left, self.right) if side.variable)

    def failure(self, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
        """Return what was found instead; None where it holds."""
        left, right = self.left.value(shapes), self.right.value(shapes)
        for side, value in ((self.left, left), (self.right, right)):
            if value is None:
                return f"{side.variable} has {len(shapes[side.variable])} axes"
        assert left is not None
        assert right is not None
        return None if RELATIONS[self.relation](left, right) else f"{left:g} and {right:g}"

    def __str__(self) -> str:
        return f"{self.left} {self.relation} {self.right}"
