"""Draws curves over the steps of a training as SVG, in the colours of the page that they are put into."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

Point = tuple[float, float]
WIDTH, HEIGHT = 480.0, 240.0
LEFT, RIGHT, TOP, BOTTOM = 52.0, 14.0, 12.0, 40.0
STYLE = """
.curve { font: 12px system-ui, sans-serif; }
.curve text { fill: var(--soft, #5c6675); }
.curve .grid { stroke: var(--line, #e1e5ec); }
.curve path { fill: none; stroke-linejoin: round; stroke-linecap: round; }
.curve .each { stroke: var(--a, #2563c9); opacity: 0.35; }
.curve .one { stroke-width: 2; }
.curve .mean { stroke: var(--a, #2563c9); stroke-width: 2.4; }
.curve .check { stroke: var(--b, #0f8a5f); stroke-width: 2.4; } .curve circle { fill: var(--b, #0f8a5f); }
"""


def curve(points: Sequence[Point], label: str, checks: bool = False, standalone: bool = False) -> str:
    """Draw values over steps: with dots where they are checks, else each value and a moving mean.

    Args:
        points: (step, value), in order; at least one.
        label: what is drawn, for screen readers.
        checks: whether they are few.
        standalone: whether it is a file of its own.
    """
    place, parts = _axes(points)
    placed = [place(*point) for point in points]
    if checks:
        parts.append(_path("check", placed))
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>' for x, y in placed]
    else:
        parts += [_path("each", placed), _path("mean", [place(*point) for point in moving_mean(points)])]
    return _svg(parts, label, standalone)


def curves(series: Mapping[str, Sequence[Point]], label: str) -> str:
    """Draw moving means of several trainings' values over steps, as a file of its own; each has a title with its name.

    Args:
        series: name -> (step, value), in order; at least one each.
        label: what is drawn, for screen readers.
    """
    means = {name: moving_mean(points) for name, points in series.items()}
    place, parts = _axes([point for points in means.values() for point in points])
    for i, (name, points) in enumerate(means.items()):
        path = _path("one", [place(*point) for point in points])
        hue = 360 * i // len(means)
        parts.append(f'<g style="stroke: hsl({hue} 65% 45%)"><title>{escape(name)}</title>{path}</g>')
        x, y = place(*points[-1])
        parts.append(f'<text x="{x - 4:.1f}" y="{y - 4:.1f}" text-anchor="end" font-size="9">{escape(name)}</text>')
    return _svg(parts, label, standalone=True)


def _axes(points: Sequence[Point]) -> tuple[Callable[[float, float], Point], list[str]]:
    """Return where a value of a step is drawn, and the lines and numbers of both axes."""
    last = max(1.0, *(step for step, _ in points))
    ticks = _ticks(min(value for _, value in points), max(value for _, value in points))
    low, high = ticks[0], ticks[-1]

    def place(step: float, value: float) -> Point:
        x = LEFT + (WIDTH - LEFT - RIGHT) * step / last
        return x, TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low)

    parts: list[str] = []
    for tick in ticks:
        y = place(0, tick)[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:.4g}</text>')
    for tick in _ticks(0, last):
        if tick <= last:
            parts.append(
                f'<text x="{place(tick, low)[0]:.1f}" y="{HEIGHT - 20}" text-anchor="middle">{tick:.4g}</text>'
            )
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">step</text>')
    return place, parts


def _svg(parts: Sequence[str], label: str, standalone: bool) -> str:
    space = ' xmlns="http://www.w3.org/2000/svg"' if standalone else ""
    style = f"<style>{STYLE}</style>" if standalone else ""
    size = f' width="{WIDTH:g}" height="{HEIGHT:g}"' if standalone else ""
    head = (
        f'<svg class="curve" viewBox="0 0 {WIDTH:g} {HEIGHT:g}"{size} role="img" aria-label="{escape(label)}"{space}>'
    )
    return f"{head}{style}{''.join(parts)}</svg>"


def moving_mean(points: Sequence[Point], width: int = 10) -> list[Point]:
    """Return the mean of the last values at every point."""
    values = [value for _, value in points]
    means = (values[max(0, i - width + 1) : i + 1] for i in range(len(values)))
    return [(step, sum(one) / len(one)) for (step, _), one in zip(points, means, strict=True)]


def _path(css: str, placed: Sequence[Point]) -> str:
    return f'<path class="{css}" d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in placed)}"/>'


def _ticks(low: float, high: float) -> list[float]:
    """Return round numbers, about five, that enclose two others."""
    span = high - low or abs(high) or 1.0
    magnitude = 10.0 ** math.floor(math.log10(span / 4))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude * 4 >= span * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * i, 12) for i in range(first, max(last, first + 1) + 1)]
