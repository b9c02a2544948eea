"""What a drawing consists of: boxes, wires, circles and words at places in pixels, from the top left."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

Anchor = Literal["start", "middle", "end"]
Point = tuple[float, float]
OPPOSITE: dict[Anchor, Anchor] = {"start": "end", "end": "start", "middle": "middle"}


@dataclass(frozen=True)
class Box:
    """A rectangle with a word in its middle, a second one under it (or beside it), and a tooltip.

    Attributes:
        css: its CSS classes; a role has the class of its name.
        taper: by how much each of its sides leans: inwards from top to bottom, or outwards when it is negative.
        key: what it stands for, such as the role of a site, by which a page finds it.
    """

    css: str
    x: float
    y: float
    width: float
    height: float
    label: str = ""
    detail: str = ""
    tip: str = ""
    radius: float = 5
    taper: float = 0
    key: str = ""


@dataclass(frozen=True)
class Wire:
    """A line through points; `arrow` at its end."""

    points: tuple[Point, ...]
    css: str = "wire"
    arrow: bool = True


@dataclass(frozen=True)
class Circle:
    """An operation: "plus", "times", "bend" (a nonlinearity) or "concat"; a "dot" is where a wire forks.

    Attributes:
        css: its CSS classes.
    """

    x: float
    y: float
    sign: Literal["plus", "times", "bend", "concat", "dot"]
    tip: str = ""
    css: str = "op"


@dataclass(frozen=True)
class Words:
    """A line of text; y is its baseline."""

    x: float
    y: float
    text: str
    css: str = "soft"
    anchor: Anchor = "start"


Shape = Box | Wire | Circle | Words


def moved(shapes: Iterable[Shape], dx: float, dy: float) -> list[Shape]:
    """Return the shapes shifted."""
    return [
        replace(one, points=tuple((x + dx, y + dy) for x, y in one.points))
        if isinstance(one, Wire)
        else replace(one, x=one.x + dx, y=one.y + dy)
        for one in shapes
    ]


def mirrored(shapes: Iterable[Shape], width: float) -> list[Shape]:
    """Return the shapes mirrored within `width`; text stays readable."""
    return [_mirrored(one, width) for one in shapes]


def _mirrored(one: Shape, width: float) -> Shape:
    if isinstance(one, Wire):
        return replace(one, points=tuple((width - x, y) for x, y in one.points))
    if isinstance(one, Box):
        return replace(one, x=width - one.x - one.width)
    if isinstance(one, Words):
        return replace(one, x=width - one.x, anchor=OPPOSITE[one.anchor])
    return replace(one, x=width - one.x)


def wire(*points: Point, css: str = "wire", arrow: bool = True) -> Wire:
    """Return a wire through points."""
    return Wire(tuple(points), css, arrow)
