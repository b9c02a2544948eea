"""Charts as inline SVG, drawn here: no script, no font and no address outside of the page. Colours are CSS variables."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

Point = tuple[float, float]
WIDTH, HEIGHT = 640, 260
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
    values = [y for _, y in points] + ([level[1]] if level else [])
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    pad = max(0.02 if percent else 0.05, 0.12 * (high - low))
    low, high = max(0.0, low - pad), high + pad
    right = max((x for x, _ in points), default=1.0) or 1.0

    def at(x: float, y: float) -> str:
        return f"{LEFT + x / right * (WIDTH - LEFT - RIGHT):.1f},{TOP + (high - y) / (high - low) * (HEIGHT - TOP - BOTTOM):.1f}"

    parts = [_grid(low, high, right, percent)]
    if level is not None:
        start, end = at(0, level[1]), at(right, level[1])
        parts.append(f'<polyline class="level" points="{start} {end}"/>')
        x, y = end.split(",")
        parts.append(f'<text class="note" x="{x}" y="{float(y) - 6:.1f}" text-anchor="end">{escape(level[0])}</text>')
    for name, kind, line in series:
        parts.append(
            f'<polyline class="line {kind}" points="{" ".join(at(*point) for point in line)}"><title>{escape(name)}</title></polyline>'
        )
        if len(line) < 15:
            for x, y in line:
                cx, cy = at(x, y).split(",")
                shown = f"{100 * y:.1f} %" if percent else f"{y:.2f}"
                parts.append(
                    f'<circle class="dot {kind}" cx="{cx}" cy="{cy}" r="4"><title>step {x:g}: {shown}</title></circle>'
                )
    return _svg(WIDTH, HEIGHT, label, parts)


def _grid(low: float, high: float, right: float, percent: bool) -> str:
    parts: list[str] = []
    for i in range(5):
        value = low + (high - low) * i / 4
        y = TOP + (4 - i) / 4 * (HEIGHT - TOP - BOTTOM)
        shown = f"{100 * value:.0f} %" if percent else f"{value:.2f}"
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{shown}</text>')
    for i in range(5):
        x = LEFT + i / 4 * (WIDTH - LEFT - RIGHT)
        anchor = "middle" if i < 4 else "end"
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="{anchor}">{"step " if i == 0 else ""}{right * i / 4:.0f}</text>'
        )
    return "".join(parts)


def paired_bars(rows: Sequence[tuple[str, float, float]], label: str) -> str:
    """Two horizontal bars a row, shares from 0 to 1: the first is drawn pale, the second full."""
    height, names = 38, 190
    span = WIDTH - names - 60
    parts: list[str] = []
    for number, (name, first, second) in enumerate(rows):
        y = number * height
        parts.append(f'<text class="name" x="{names - 10}" y="{y + 21}" text-anchor="end">{escape(name)}</text>')
        for offset, kind, value in ((4, "pale", first), (18, "full", second)):
            parts.append(
                f'<rect class="{kind}" x="{names}" y="{y + offset}" width="{max(1.0, span * value):.1f}" height="12" rx="2"/>'
            )
            shown = f"{100 * value:.0f} %"
            parts.append(f'<text class="tick" x="{names + span * value + 6:.1f}" y="{y + offset + 10}">{shown}</text>')
    return _svg(WIDTH, height * len(rows) + 4, label, parts)


def confusion(matrix: Sequence[Sequence[int]], names: Sequence[str], label: str) -> str:
    """Counts of true families (rows) by predicted ones (columns); the darker, the larger the share of the row."""
    cell, left, top = 50, 180, 24
    size = len(names)
    parts = [
        f'<text class="tick" x="{left + (i + 0.5) * cell}" y="16" text-anchor="middle">{i + 1}</text>'
        for i in range(size)
    ]
    for i, row in enumerate(matrix):
        y, total = top + i * cell, max(1, sum(row))
        parts.append(
            f'<text class="name" x="{left - 10}" y="{y + 30}" text-anchor="end">{i + 1} {escape(names[i])}</text>'
        )
        for j, value in enumerate(row):
            share = value / total
            kind = "hit" if i == j else "miss"
            dark = " dark" if share > 0.45 else ""
            title = f"{value} of {total} sentences of {names[i]} taken for {names[j]}"
            parts.append(
                f"<g><title>{escape(title)}</title>"
                f'<rect class="{kind}" x="{left + j * cell + 1}" y="{y + 1}" width="{cell - 2}" height="{cell - 2}" rx="4" '
                f'fill-opacity="{0.06 + 0.94 * share:.2f}"/>'
                f'<text class="cell{dark}" x="{left + (j + 0.5) * cell}" y="{y + 30}" text-anchor="middle">{value or ""}</text></g>'
            )
    return _svg(left + size * cell + 6, top + size * cell + 6, label, parts)


def ratio_bars(rows: Sequence[tuple[str, float, str]], label: str) -> str:
    """Horizontal bars for ratios to the first row; the third entry of a row is its text."""
    height, names = 30, 120
    longest = max((value for _, value, _ in rows), default=1.0) or 1.0
    span = WIDTH - names - 170
    parts: list[str] = []
    for number, (name, value, shown) in enumerate(rows):
        y = number * height
        parts.append(f'<text class="name" x="{names - 10}" y="{y + 19}" text-anchor="end">{escape(name)}</text>')
        parts.append(
            f'<rect class="full k{number % 3}" x="{names}" y="{y + 5}" width="{span * value / longest:.1f}" height="18" rx="3"/>'
        )
        parts.append(
            f'<text class="tick" x="{names + span * value / longest + 8:.1f}" y="{y + 19}">{escape(shown)}</text>'
        )
    return _svg(WIDTH, height * len(rows) + 4, label, parts)


def site_map(blocks: Sequence[tuple[str, Sequence[tuple[str, tuple[str, ...]]]]], label: str) -> str:
    """One row a block, one box a site; a box is coloured by the passes on it.

    Args:
        blocks: for each block its name and its sites: role, and the words of the passes on it.
        label: what it shows, for screen readers.
    """
    left, height, gap = 78, 46, 6
    columns = max((len(sites) for _, sites in blocks), default=1)
    box = (WIDTH + 120 - left) / columns
    parts: list[str] = []
    for number, (name, sites) in enumerate(blocks):
        y = number * height
        parts.append(f'<text class="name" x="{left - 10}" y="{y + 25}" text-anchor="end">{escape(name)}</text>')
        for place, (role, passes) in enumerate(sites):
            x = left + place * box
            kind = "site " + ("two" if len(passes) > 1 else passes[0] if passes else "plain")
            shown = role.replace("attention.", "").replace("ffn.", "")
            title = f"{name} {role}: {', '.join(passes) or 'frozen'}"
            parts.append(
                f"<g><title>{escape(title)}</title>"
                f'<rect class="{kind}" x="{x:.1f}" y="{y + 4}" width="{box - gap:.1f}" height="34" rx="6"/>'
                f'<text class="box{"" if passes else " off"}" x="{x + (box - gap) / 2:.1f}" y="{y + 26}" text-anchor="middle">{escape(shown)}</text></g>'
            )
    return _svg(WIDTH + 120, height * len(blocks) + 2, label, parts)


def _svg(width: float, height: float, label: str, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'
