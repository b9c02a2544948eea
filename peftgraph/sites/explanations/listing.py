"""Sites as a table: every site for a terminal, sites that are alike in several layers on one row for a notebook."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from html import escape

from peftgraph.sites.site import Site

HEAD = ("role", "path", "layer", "stack", "kind", "columns", "shape")
LAYER = HEAD.index("layer")


def as_text(sites: Iterable[Site]) -> str:
    """Return a line a site."""
    rows = [HEAD, *map(_row, sites)]
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def as_html(sites: Iterable[Site]) -> str:
    """Return a table with a row for the sites that differ in the number of their layer alone; * stands for it in a
    path."""
    alike: dict[tuple[str, ...], list[int]] = {}
    for site in sites:
        row = _row(site)
        numbered = tuple("*" if part == row[LAYER] else part for part in site.path.split("."))
        layers = alike.setdefault((row[0], ".".join(numbered), *row[LAYER + 1 :]), [])
        layers += [] if site.layer is None else [site.layer]
    rows = [(role, path, ranges(sorted(set(layers))), *rest) for (role, path, *rest), layers in alike.items()]
    body = "".join(_line("td", row) for row in rows)
    return f"<table><thead>{_line('th', HEAD)}</thead><tbody>{body}</tbody></table>"


def _line(kind: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{kind}>{escape(cell)}</{kind}>" for cell in cells) + "</tr>"


def ranges(numbers: Sequence[int], most: int = 4) -> str:
    """Sorted numbers as ranges: "0-3, 6-9", "0, 2, ... 30" where they follow each other at one distance.

    >>> ranges([0, 1, 2, 5]), ranges([1, 3, 5, 7, 9]), ranges([4])
    ('0-2, 5', '1, 3, ... 9', '4')
    """
    steps = {b - a for a, b in itertools.pairwise(numbers)}
    if len(numbers) > 3 and len(steps) == 1 and steps != {1}:
        return f"{numbers[0]}, {numbers[1]}, ... {numbers[-1]}"
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    shown = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return ", ".join(shown if len(shown) <= most else [*shown[: most - 2], "...", shown[-1]]).replace("..., ", "... ")


def _row(site: Site) -> tuple[str, ...]:
    role = site.role if site.expert is None else f"{site.role}[expert {site.expert}]"
    layer = "" if site.layer is None else str(site.layer)
    shape = "" if site.shape is None else " x ".join(map(str, site.shape))
    columns = "" if site.columns is None else str(site.columns)
    return role, site.path, layer, site.stack or "", site.kind or "", columns, shape
