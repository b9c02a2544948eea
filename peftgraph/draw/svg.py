"""Shapes as SVG. Colours and fonts are CSS classes; `STYLE` gives them in a light and a dark scheme."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from importlib.resources import files

from peftgraph.draw.shapes import Box, Circle, Point, Shape, Wire, Words
from peftgraph.sites.roles import ROLES

RADIUS = 8
SIGNS = {
    "plus": "M-4 0H4M0-4V4",
    "times": "M-3-3L3 3M-3 3L3-3",
    "bend": "M-5 3C-1 3 1-3 5-3",
    "concat": "M-2.5-4V4M2.5-4V4",
}


def style() -> str:
    """Return the CSS of the drawings: the style sheet, and the colour of each role."""
    colours = [f".figure .{css_class(one.name)} {{ --hue: var(--{one.fill}); }}\n" for one in ROLES if one.fill]
    return files("peftgraph.draw").joinpath("figure.css").read_text(encoding="utf-8") + "".join(colours)


def css_class(role: str) -> str:
    """Return the CSS class of a role's boxes; `head` is that of arrows."""
    return "head-out" if role == "head" else role.replace(".", "-")


def svg(shapes: Iterable[Shape], width: float, height: float, label: str, standalone: bool = False) -> str:
    """Return a drawing as one SVG element.

    Args:
        shapes: the shapes to draw; later ones are on top.
        width: in pixels, like `height`.
        height: in pixels.
        label: what it shows, for screen readers.
        standalone: whether to include style and name space, for a file of its own.
    """
    head = f'viewBox="0 0 {_number(width)} {_number(height)}" width="{_number(width)}" height="{_number(height)}"'
    own = ' xmlns="http://www.w3.org/2000/svg"' if standalone else ""
    inner = f"<style>{style()}</style>" if standalone else ""
    body = "".join(map(_shape, shapes))
    return f'<svg class="figure" {head} role="img" aria-label="{escape(label)}"{own}>{inner}{body}</svg>'


def _shape(one: Shape) -> str:
    if isinstance(one, Box):
        return _box(one)
    if isinstance(one, Wire):
        return _wire(one)
    if isinstance(one, Circle):
        tip = f"<title>{escape(one.tip)}</title>" if one.tip else ""
        if one.sign == "dot":
            return f'<circle class="{one.css}" cx="{_number(one.x)}" cy="{_number(one.y)}" r="2.2"/>'
        place = f"translate({_number(one.x)} {_number(one.y)})"
        return f'<g class="{one.css}" transform="{place}">{tip}<circle r="{RADIUS}"/><path d="{SIGNS[one.sign]}"/></g>'
    return _words(one)


def box_words(one: Box) -> list[Words]:
    """Return the words of a box: its label, and its detail below it or, where it is low, beside it."""
    middle = one.x + one.width / 2
    if one.label and one.detail and one.height >= 38:
        first = Words(middle, one.y + one.height / 2 - 1, one.label, "label", "middle")
        return [first, Words(middle, one.y + one.height / 2 + 13, one.detail, "detail", "middle")]
    if not one.label:
        return []
    y = one.y + one.height / 2 + 4
    if not one.detail:
        return [Words(middle, y, one.label, "label", "middle")]
    label, detail = 7.0 * len(one.label), 5.4 * len(one.detail)
    start = middle - (label + 7 + detail) / 2 + label
    return [Words(start, y, one.label, "label", "end"), Words(start + 7, y, one.detail, "detail")]


def _box(one: Box) -> str:
    place = f'x="{_number(one.x)}" y="{_number(one.y)}" width="{_number(one.width)}" height="{_number(one.height)}"'
    tip = f"<title>{escape(one.tip)}</title>" if one.tip else ""
    lines = [_words(words) for words in box_words(one)]
    if one.label and one.detail and one.height < 38:  # a browser measures the words itself
        beside = f'<tspan class="detail" dx="7">{escape(one.detail)}</tspan>'
        lines = [
            f'<text class="label" x="{_number(one.x + one.width / 2)}" y="{_number(one.y + one.height / 2 + 4)}" '
            f'text-anchor="middle">{escape(one.label)}{beside}</text>'
        ]
    form = (
        f'<polygon points="{" ".join(_pair(*corner) for corner in corners(one))}"/>'
        if one.taper
        else (f'<rect {place} rx="{_number(one.radius)}"/>')
    )
    key = f' data-site="{escape(one.key)}"' if one.key else ""
    return f'<g class="{one.css}"{key}>{tip}{form}{"".join(lines)}</g>'


def corners(one: Box) -> list[Point]:
    """Return the corners of a box with slanted sides."""
    top, bottom = max(-one.taper, 0.0), max(one.taper, 0.0)
    left, right, low = one.x, one.x + one.width, one.y + one.height
    return [(left + top, one.y), (right - top, one.y), (right - bottom, low), (left + bottom, low)]


def rounded(one: Wire) -> list[tuple[Point, Point, Point]]:
    """Return for each corner of a line where its curve begins, the corner, and where the curve ends."""
    found: list[tuple[Point, Point, Point]] = []
    for before, here, after in zip(one.points, one.points[1:], one.points[2:], strict=False):
        near = min(6.0, _distance(before, here) / 2, _distance(here, after) / 2)
        found.append((_towards(here, before, near), here, _towards(here, after, near)))
    return found


def tip_of(one: Wire) -> list[Point]:
    """Return the corners of a line's arrowhead."""
    (x0, y0), (x1, y1) = one.points[-2:]
    length = _distance((x0, y0), (x1, y1)) or 1.0
    dx, dy = (x1 - x0) / length, (y1 - y0) / length
    return [
        (x1, y1),
        (x1 - 6 * dx - 3.2 * dy, y1 - 6 * dy + 3.2 * dx),
        (x1 - 6 * dx + 3.2 * dy, y1 - 6 * dy - 3.2 * dx),
    ]


def _wire(one: Wire) -> str:
    """Draw a line with rounded corners; the arrowhead is a separate path, so that no marker is needed."""
    path = f"M{_pair(*one.points[0])}"
    for before, here, after in rounded(one):
        path += f"L{_pair(*before)}Q{_pair(*here)} {_pair(*after)}"
    path += f"L{_pair(*one.points[-1])}"
    head = f'<path class="head" d="M{"L".join(_pair(*point) for point in tip_of(one))}Z"/>' if one.arrow else ""
    return f'<g class="{one.css}"><path d="{path}"/>{head}</g>'


def _words(one: Words) -> str:
    return (
        f'<text class="{one.css}" x="{_number(one.x)}" y="{_number(one.y)}" '
        f'text-anchor="{one.anchor}">{escape(one.text)}</text>'
    )


def _distance(a: tuple[float, float], b: tuple[float, float]) -> float:
    return abs(a[0] - b[0]) + abs(a[1] - b[1])


def _towards(a: tuple[float, float], b: tuple[float, float], by: float) -> tuple[float, float]:
    length = _distance(a, b) or 1.0
    return a[0] + (b[0] - a[0]) / length * by, a[1] + (b[1] - a[1]) / length * by


def _pair(x: float, y: float) -> str:
    return f"{_number(x)} {_number(y)}"


def _number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
