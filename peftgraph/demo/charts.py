"""Draws the charts of the quickstart's report by matplotlib, as SVG to put into an HTML page.

A chart has no background, and its colours are the page's CSS variables, so that it follows a light or dark scheme; text
is text in the page's font. Equal data give equal bytes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, PercentFormatter

Point = tuple[float, float]
PIXELS = 72  # an inch of a figure: SVG units are then the page's pixels
# CSS variable of the page -> the colour that stands for it while matplotlib draws.
COLOURS = {
    "ink": "#1c2330",
    "soft": "#5c6675",
    "grid": "#e6eaf1",
    "a": "#2563c9",
    "b": "#0f8a5f",
    "c": "#b4570a",
    "pale": "#b9c4d6",
}
SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 12,
    "text.color": COLOURS["ink"],
    "axes.edgecolor": "none",
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": COLOURS["grid"],
    "xtick.color": COLOURS["soft"],
    "ytick.color": COLOURS["soft"],
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.solid_capstyle": "round",
}


def loss_chart(losses: Sequence[Point], mean: Sequence[Point]) -> str:
    """Draw the loss over steps: every step, and a moving mean."""

    def draw(axes: Axes) -> None:
        axes.plot(*_columns(losses), color=COLOURS["a"], alpha=0.35, linewidth=1)
        axes.plot(*_columns(mean), color=COLOURS["a"], linewidth=2.4)
        _label_steps(axes, losses)

    return _render(draw, 480, 240, "training loss over steps")


def accuracy_chart(checks: Sequence[Point], baseline: float) -> str:
    """Draw validation accuracies over steps, and the baseline's as a dashed line."""

    def draw(axes: Axes) -> None:
        axes.axhline(baseline, color=COLOURS["c"], linewidth=1.6, dashes=(4, 3))
        axes.plot(*_columns(checks), color=COLOURS["b"], linewidth=2.4, marker="o", markersize=7, clip_on=False)
        _label_steps(axes, checks)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
        axes.annotate(
            "frozen head", (1, baseline), xycoords=("axes fraction", "data"), xytext=(0, 5), color=COLOURS["c"],
            textcoords="offset points", ha="right",
        )  # fmt: skip

    return _render(draw, 480, 240, "validation accuracy over steps")


def share_chart(rows: Sequence[tuple[str, float, float]], title: str) -> str:
    """Draw two horizontal bars for each row, shares from 0 to 1: the frozen head's pale, the tuned one's full."""

    def draw(axes: Axes) -> None:
        for number, (_, frozen, tuned) in enumerate(rows):
            for offset, value, colour in ((-0.18, frozen, "pale"), (0.18, tuned, "b")):
                axes.barh(number + offset, value, 0.3, color=COLOURS[colour])
                axes.text(value + 0.015, number + offset, f"{value:.0%}", va="center", color=COLOURS["soft"])
        _label_rows(axes, [name for name, _, _ in rows], 1.12)

    return _render(draw, 480, 48 * len(rows) + 8, title)


def latency_chart(rows: Sequence[tuple[str, float, str]], title: str) -> str:
    """Draw horizontal bars of ratios to the first row; the third entry of a row is the text beside its bar."""

    def draw(axes: Axes) -> None:
        longest = max((value for _, value, _ in rows), default=1.0)
        for number, (_, value, text) in enumerate(rows):
            axes.barh(number, value, 0.6, color=COLOURS[("pale", "c", "b")[number % 3]])
            axes.text(value + 0.02 * longest, number, text, va="center", color=COLOURS["soft"])
        _label_rows(axes, [name for name, _, _ in rows], 1.75 * longest)

    return _render(draw, 480, 30 * len(rows) + 8, title)


def _columns(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _label_steps(axes: Axes, points: Sequence[Point]) -> None:
    """Label the axis of steps, from 0 to the last one."""
    last = max((x for x, _ in points), default=1.0)
    axes.set_xlim(0, max(1.0, last))
    axes.margins(y=0.12)
    axes.set_xlabel("step", color=COLOURS["soft"])
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.grid(False, axis="x")


def _label_rows(axes: Axes, names: Sequence[str], right: float) -> None:
    """Label horizontal bars by name, from top to bottom, and hide the axis of values."""
    axes.set_yticks(range(len(names)), names, color=COLOURS["ink"])
    axes.set(xlim=(0, right), ylim=(len(names) - 0.5, -0.5))
    axes.set_xticks([])
    axes.grid(False)


def _render(draw: Callable[[Axes], None], width: int, height: int, label: str) -> str:
    """Render a chart as an SVG element for HTML.

    Args:
        draw: draws on the axes.
        width: of the chart, in pixels.
        height: of the chart, in pixels.
        label: what the chart shows, for screen readers.
    """
    target = io.StringIO()
    with matplotlib.rc_context({**SETTINGS, "svg.hashsalt": label}):
        layout = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02)
        figure = Figure(figsize=(width / PIXELS, height / PIXELS), layout=layout, facecolor="none")
        draw(figure.add_subplot())
        figure.savefig(target, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return _inline(target.getvalue(), width, height, label)


def _inline(document: str, width: int, height: int, label: str) -> str:
    """Turn an SVG document into an element of an HTML page: without addresses, in its font, colours and width."""
    _, _, body = document.partition("<svg")
    _, _, body = body.partition(">")
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r"font-family: [^;\"]+;? ?", "", body)
    used = set(re.findall(r"#([\w-]+)\"", body)) | set(re.findall(r"url\(#([\w-]+)\)", body))
    body = re.sub(r' id="([\w.-]+)"', lambda found: found[0] if found[1] in used else "", body)
    for name, colour in COLOURS.items():
        body = body.replace(colour, f"var(--{name})")
    body = re.sub(r"\s*\n\s*", "\n", body)
    opening = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}" stroke-linejoin="round">'
    return opening + body.strip()
