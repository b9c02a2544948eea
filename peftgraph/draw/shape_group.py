"""Shapes around a line, with the room that they take."""

from __future__ import annotations

from dataclasses import dataclass, field

from peftgraph.draw.shapes import Point, Shape, mirrored, moved


@dataclass(frozen=True)
class Extent:
    """Room that is taken between two heights, from `left` to `right` of the line."""

    top: float
    bottom: float
    left: float
    right: float


@dataclass
class ShapeGroup:
    """What a line or an element is drawn as, around x = 0 and from y = 0 on.

    Attributes:
        extents: the room that the shapes take.
        height: where it ends.
        memory: the points at which wires from the memory of a cross-attention come in from the right.
    """

    shapes: list[Shape] = field(default_factory=list)
    extents: list[Extent] = field(default_factory=list)
    height: float = 0.0
    memory: list[Point] = field(default_factory=list)

    @property
    def left(self) -> float:
        """The leftmost x."""
        return min((one.left for one in self.extents), default=0.0)

    @property
    def right(self) -> float:
        """The rightmost x."""
        return max((one.right for one in self.extents), default=0.0)

    def add(self, other: ShapeGroup, dx: float, dy: float) -> None:
        """Add another group at a position; `height` does not change."""
        self.shapes += moved(other.shapes, dx, dy)
        self.extents += [Extent(e.top + dy, e.bottom + dy, e.left + dx, e.right + dx) for e in other.extents]
        self.memory += [(x + dx, y + dy) for x, y in other.memory]

    def mirrored(self) -> ShapeGroup:
        """Return the group mirrored at the line."""
        extents = [Extent(e.top, e.bottom, -e.right, -e.left) for e in self.extents]
        return ShapeGroup(mirrored(self.shapes, 0.0), extents, self.height, [(-x, y) for x, y in self.memory])
