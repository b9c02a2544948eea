"""Paints a drawing by matplotlib, as PDF or PNG: the shapes of the SVG, in its light scheme."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.patches import Circle as RoundPatch
from matplotlib.patches import FancyBboxPatch, PathPatch, Polygon
from matplotlib.path import Path as Outline

from peftgraph.draw.css_values import Element, values_of
from peftgraph.draw.shapes import Box, Circle, Point, Shape, Wire, Words
from peftgraph.draw.svg import RADIUS, SIGNS, box_words, corners, rounded, tip_of

PIXELS = 96  # an inch of the drawing
SHARPNESS = 2  # pixels of a PNG for each of the drawing
FAMILIES = ("Segoe UI", "Helvetica Neue", "Helvetica", "Arial", "Liberation Sans", "DejaVu Sans")
WIDE = {"DejaVu Sans": 0.9}  # a font that is wider than those that the boxes are made for, and its scale
ROOT: Element = ("svg", frozenset(("figure",)))


def paint(shapes: Sequence[Shape], width: float, height: float, file: Path) -> None:
    """Paint shapes into a file, of the format that its suffix names; equal shapes give equal bytes.

    Args:
        shapes: later ones are on top.
        width: in pixels, as is `height`.
        height: of the drawing.
        file: where to.
    """
    with matplotlib.rc_context({"lines.scale_dashes": False, "pdf.fonttype": 42}):
        figure = Figure(figsize=(width / PIXELS, height / PIXELS), facecolor="none")
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, width), ylim=(height, 0))
        axes.axis("off")
        for order, shape in enumerate(shapes):
            _paint(axes, shape, order)
        about = {"CreationDate": None} if file.suffix == ".pdf" else {"Software": None}
        figure.savefig(file, format=file.suffix[1:], dpi=PIXELS * SHARPNESS, metadata=about, transparent=True)


def _paint(axes: Axes, one: Shape, order: int) -> None:
    if isinstance(one, Words):
        _write(axes, (ROOT, _element("text", one.css)), one, order)
        return
    group = (ROOT, _element("g", one.css))
    if isinstance(one, Box):
        kind = "polygon" if one.taper else "rect"
        if one.taper:
            patch: Any = Polygon(corners(one), closed=True)
        else:
            size = f"round,pad=0,rounding_size={min(one.radius, one.height / 2, one.width / 2)}"
            patch = FancyBboxPatch((one.x, one.y), one.width, one.height, boxstyle=size)
        _add(axes, patch, (*group, _element(kind)), order)
        for words in box_words(one):
            _write(axes, (*group, _element("text", words.css)), words, order)
    elif isinstance(one, Circle):
        if one.sign == "dot":
            _add(axes, RoundPatch((one.x, one.y), 2.2), (ROOT, _element("circle", one.css)), order)
            return
        _add(axes, RoundPatch((one.x, one.y), RADIUS), (*group, _element("circle")), order)
        _add(axes, PathPatch(_sign(one)), (*group, _element("path")), order)
    else:
        _add(axes, PathPatch(_line(one)), (*group, _element("path")), order)
        if one.arrow:
            _add(axes, Polygon(tip_of(one), closed=True), (*group, _element("path", "head")), order)


def _element(name: str, css: str = "") -> Element:
    return name, frozenset(css.split())


def _add(axes: Axes, patch: Any, path: tuple[Element, ...], order: int) -> None:
    """Add a patch with what the style sheet says of it."""
    values = values_of(path)
    fill, stroke = values.get("fill", "#000000"), values.get("stroke", "none")
    dashes = [0.75 * float(part) for part in values.get("stroke-dasharray", "none").split() if part != "none"]
    patch.set(
        facecolor=fill, edgecolor=stroke, linewidth=0.75 * float(values.get("stroke-width", 1)), zorder=order,
        linestyle=(0, tuple(dashes)) if dashes else "solid", alpha=float(values.get("opacity", 1)), capstyle="butt",
    )  # fmt: skip
    axes.add_patch(patch)


def _write(axes: Axes, path: tuple[Element, ...], one: Words, order: int) -> None:
    values = values_of(path)
    size = float(values.get("font-size", "12px").removesuffix("px"))
    mono, serif = "monospace" in values.get("font-family", ""), "Georgia" in values.get("font-family", "")
    family = "DejaVu Sans Mono" if mono else "DejaVu Serif" if serif else _family()
    axes.text(
        one.x, one.y, one.text.replace("$", r"\$"), color=values.get("fill", "#000000"), va="baseline", family=family,
        ha={"start": "left", "middle": "center", "end": "right"}[one.anchor], zorder=order,
        fontsize=0.75 * size * WIDE.get(family, 1.0), style=values.get("font-style", "normal"),
        weight="bold" if int(values.get("font-weight", 400)) >= 600 else "normal",
    )  # fmt: skip


def _family() -> str:
    names = {font.name for font in fontManager.ttflist}
    return next(name for name in FAMILIES if name in names)


def _line(one: Wire) -> Outline:
    """Return a line with rounded corners."""
    points: list[Point] = [one.points[0]]
    codes = [Outline.MOVETO]
    for before, here, after in rounded(one):
        points += [before, here, after]
        codes += [Outline.LINETO, Outline.CURVE3, Outline.CURVE3]
    return Outline([*points, one.points[-1]], [*codes, Outline.LINETO])


def _sign(one: Circle) -> Outline:
    """Return the strokes inside a circle."""
    points: list[Point] = []
    codes: list[Any] = []
    for code, (x, y) in _strokes(SIGNS[one.sign]):
        points.append((one.x + x, one.y + y))
        codes.append(code)
    return Outline(points, codes)


def _strokes(text: str) -> Iterator[tuple[Any, Point]]:
    """Yield the points of a path in SVG's words: M, L, H, V and C."""
    x = y = 0.0
    for word, rest in re.findall(r"([MLHVC])([^MLHVC]*)", text):
        numbers = [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", rest)]
        if word == "H":
            x = numbers[0]
            yield Outline.LINETO, (x, y)
        elif word == "V":
            y = numbers[0]
            yield Outline.LINETO, (x, y)
        else:
            code = {"M": Outline.MOVETO, "L": Outline.LINETO, "C": Outline.CURVE4}[word]
            for x, y in zip(numbers[::2], numbers[1::2], strict=True):
                yield code, (x, y)
