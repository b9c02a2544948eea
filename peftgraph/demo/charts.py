"""Charts as inline SVG, drawn here: no script, no font, no address outside of the page. Colours are CSS classes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

Point = tuple[float, float]
WIDTH, HEIGHT = 480, 240
MAP = 760  # the width of the site map
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 12, 30


def line_chart(
    series: Sequence[tuple[str, str, Sequence[Point]]],
    label: str,
    percent: bool = False,
    level: tuple[str, float] | None = None,
) -> str:
    """Lines over steps.

    Args:
        series: for each line its name, its CSS class (`a`, `b`, `thin`) and its points.
        label: what the chart shows, for screen readers.
        percent: y values are shares.
        level: a dashed horizontal line to compare with: its name and value.
    """
    points = [point for _, _, line in series for point in line]
    ticks = _ticks([y for _, y in points] + ([level[1]] if level else []))
    low, high, right = ticks[0], ticks[-1], max((x for x, _ in points), default=1.0) or 1.0

    def at(point: Point) -> Point:
        x = LEFT + point[0] / right * (WIDTH - LEFT - RIGHT)
        return x, TOP + (high - point[1]) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts: list[str] = []
    for value in ticks:
        y = at((0, value))[1]
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>')
        parts.append(_text("tick", LEFT - 6, y + 4, f"{100 * value:.0f} %" if percent else f"{value:.1f}", "end"))
    for i in range(5):
        shown = f"{right * i / 4:.0f}" if i else "step 0"
        parts.append(_text("tick", at((right * i / 4, 0))[0], HEIGHT - 8, shown, "end" if i == 4 else "middle"))
    if level is not None:
        ends = [at((0, level[1])), at((right, level[1]))]
        parts += [_line("level", ends, level[0]), _text("note", ends[1][0], ends[1][1] - 6, level[0], "end")]
    for name, kind, line in series:
        parts.append(_line(f"line {kind}", [at(point) for point in line], name))
        if kind != "thin" and len(line) < 15:
            parts += [_dot(kind, at(point), point, percent) for point in line]
    return _svg(WIDTH, HEIGHT, label, parts)


def paired_bars(rows: Sequence[tuple[str, float, float]], label: str) -> str:
    """Two horizontal bars a row, shares from 0 to 1: the first is drawn pale, the second full."""
    height, names = 44, 150
    span = WIDTH - names - 60
    parts: list[str] = []
    for number, (name, first, second) in enumerate(rows):
        y = number * height
        parts.append(_text("name", names - 10, y + 23, name, "end"))
        for top, kind, value in ((y + 5, "pale", first), (y + 20, "full", second)):
            parts.append(_rect(kind, names, top, max(1.0, span * value), 12))
            parts.append(_text("tick", names + span * value + 6, top + 10, f"{100 * value:.0f} %"))
    return _svg(WIDTH, height * len(rows) + 4, label, parts)


def confusion(matrix: Sequence[Sequence[int]], names: Sequence[str], label: str) -> str:
    """Counts of true families (rows) by predicted ones (columns); the darker, the larger the share of the row."""
    cell, left, top = 40, 165, 24
    parts = [_text("tick", left + (i + 0.5) * cell, 16, str(i + 1), "middle") for i in range(len(names))]
    for i, row in enumerate(matrix):
        y = top + i * cell
        parts.append(_text("name", left - 10, y + 25, f"{i + 1} {names[i]}", "end"))
        for j, value in enumerate(row):
            share, x = value / max(1, sum(row)), left + j * cell
            title = f"{value} of {sum(row)} sentences of {names[i]} taken for {names[j]}"
            box = _rect("hit" if i == j else "miss", x + 1, y + 1, cell - 2, cell - 2, 0.06 + 0.94 * share)
            number = _text("cell dark" if share > 0.45 else "cell", x + cell / 2, y + 25, str(value or ""), "middle")
            parts.append(f"<g><title>{escape(title)}</title>{box}{number}</g>")
    return _svg(left + len(names) * cell + 6, top + len(names) * cell + 6, label, parts)


def ratio_bars(rows: Sequence[tuple[str, float, str]], label: str) -> str:
    """Horizontal bars for ratios to the first row; the third entry of a row is its text."""
    height, names = 30, 80
    longest = max((value for _, value, _ in rows), default=1.0) or 1.0
    parts: list[str] = []
    for number, (name, value, shown) in enumerate(rows):
        y, width = number * height, (WIDTH - names - 135) * value / longest
        parts.append(_text("name", names - 10, y + 19, name, "end"))
        parts.append(_rect(f"full k{number % 3}", names, y + 5, width, 18))
        parts.append(_text("tick", names + width + 8, y + 19, shown))
    return _svg(WIDTH, height * len(rows) + 4, label, parts)


def site_map(blocks: Sequence[tuple[str, Sequence[tuple[str, tuple[str, ...]]]]], label: str) -> str:
    """One row a block, one box a site; a box is coloured by the passes on it.

    Args:
        blocks: for each block its name and its sites: role, and the words of the passes on it.
        label: what it shows, for screen readers.
    """
    left, height, gap = 70, 46, 6
    box = (MAP - left) / max((len(sites) for _, sites in blocks), default=1)
    parts: list[str] = []
    for number, (name, sites) in enumerate(blocks):
        y = number * height
        parts.append(_text("name", left - 10, y + 25, name, "end"))
        for place, (role, passes) in enumerate(sites):
            x = left + place * box
            kind = "two" if len(passes) > 1 else "".join(passes) or "plain"
            shown = role.replace("attention.", "").replace("ffn.", "")
            title = f"{name} {role}: {', '.join(passes) or 'frozen'}"
            text = _text("box" if passes else "box off", x + (box - gap) / 2, y + 26, shown, "middle")
            rect = _rect(f"site {kind}", x, y + 4, box - gap, 34)
            parts.append(f"<g><title>{escape(title)}</title>{rect}{text}</g>")
    return _svg(MAP, height * len(blocks) + 2, label, parts)


def _ticks(values: Sequence[float]) -> list[float]:
    """Round numbers that hold all values, four to seven of them."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    rough = max(high - low, 0.02) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [number * step for number in range(first, max(last, first + 1) + 1)]


def _line(kind: str, points: Sequence[Point], name: str) -> str:
    shown = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline class="{kind}" points="{shown}"><title>{escape(name)}</title></polyline>'


def _dot(kind: str, place: Point, point: Point, percent: bool) -> str:
    shown = f"step {point[0]:g}: " + (f"{100 * point[1]:.1f} %" if percent else f"{point[1]:.2f}")
    x, y = place
    return f'<circle class="dot {kind}" cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{shown}</title></circle>'


def _text(kind: str, x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _rect(kind: str, x: float, y: float, width: float, height: float, opacity: float = 1.0) -> str:
    size = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="4"'
    return f'<rect class="{kind}" {size} fill-opacity="{opacity:.2f}"/>'


def _svg(width: float, height: float, label: str, parts: Sequence[str]) -> str:
    opening = f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(label)}">'
    return f"{opening}{''.join(parts)}</svg>"
