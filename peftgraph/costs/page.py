"""A comparison as a page of its own: a bar of training memory for each recipe, and the table. One file, no script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from peftgraph.costs.format import format_bytes

STYLE = """
.costs { --ink: #1f2430; --paper: #ffffff; --line: #d9dce3; --weights: #8a93a6; --gradients: #d98b3a;
  --optimiser: #b1544f; --activations: #3f7f93; color: var(--ink); background: var(--paper);
  font: 14px/1.5 system-ui, sans-serif; }
@media (prefers-color-scheme: dark) { .costs { --ink: #e6e8ee; --paper: #16181d; --line: #3a3f4b; } }
.costs table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.costs th, .costs td { padding: .25em .7em; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; }
.costs th:first-child, .costs td:first-child { text-align: left; white-space: normal; }
.costs .scroll { overflow-x: auto; }
.costs text { fill: var(--ink); font: 13px system-ui, sans-serif; }
"""
WIDTH, BAR, GAP, LABELS, SHOWN = 860, 22, 10, 300, 40


@dataclass(frozen=True)
class Bar:
    """One bar of the picture: its label, and its parts in bytes by the name of their colour in the style."""

    label: str
    parts: Mapping[str, int]


def page(title: str, facts: str, cells: Sequence[Sequence[str]], bars: Sequence[Bar]) -> str:
    """Return the HTML page of a comparison.

    Args:
        title: its headline.
        facts: a line below it.
        cells: the table, the headings first.
        bars: the picture.
    """
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{escape(title)}</title>'
        "<style>body { margin: 2rem auto; max-width: 1500px; padding: 0 1rem; }</style></head>"
        f"<body>{fragment(title, facts, cells, bars)}</body></html>\n"
    )


def fragment(title: str, facts: str, cells: Sequence[Sequence[str]], bars: Sequence[Bar]) -> str:
    """Return the picture and the table with their style, as HTML for a notebook. Arguments as for `page`."""
    return (
        f'<div class="costs"><style>{STYLE}</style><h2>{escape(title)}</h2><p>{escape(facts)}</p>'
        f'<div class="scroll">{_picture(bars)}</div><div class="scroll">{_table(cells)}</div></div>'
    )


def _table(cells: Sequence[Sequence[str]]) -> str:
    head, *rows = cells
    heading = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{heading}</tr></thead><tbody>{body}</tbody></table>"


def _picture(bars: Sequence[Bar]) -> str:
    """Return the memory of training as a drawing: one bar for each recipe, one colour for each part."""
    longest = max(sum(bar.parts.values()) for bar in bars)
    lines = [_bar(bar, i * (BAR + GAP) + GAP, longest) for i, bar in enumerate(bars)]
    key_y = len(bars) * (BAR + GAP) + 2 * GAP
    for i, name in enumerate(bars[0].parts):
        x = LABELS + i * 120
        lines.append(f'<rect x="{x}" y="{key_y}" width="14" height="14" fill="var(--{name})"/>')
        lines.append(f'<text x="{x + 20}" y="{key_y + 12}">{name}</text>')
    height = key_y + 24
    return (
        f'<svg role="img" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}">'
        f"<title>Memory of training</title>{''.join(lines)}</svg>"
    )


def _bar(bar: Bar, y: int, longest: int) -> str:
    shown = bar.label if len(bar.label) <= SHOWN else f"{bar.label[: SHOWN - 1]}…"
    text_y = y + BAR - 6
    lines = [f'<text x="{LABELS - 10}" y="{text_y}" text-anchor="end">{escape(shown)}</text>']
    x = float(LABELS)
    for name, size in bar.parts.items():
        width = (WIDTH - LABELS - 90) * size / longest
        lines.append(f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{BAR}" fill="var(--{name})"/>')
        x += width
    lines.append(f'<text x="{x + 6:.1f}" y="{text_y}">{format_bytes(sum(bar.parts.values()))}</text>')
    return "".join(lines)
