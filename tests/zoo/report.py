"""The zoo's report: a table, the totals, and what they must reach."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .score import TALLIES, Row, Tally

TITLES = ("model", "group", "traced", *TALLIES, "false", "s")
# What the totals must reach, in percent.
REACH = {"attention": 99.0, "roles": 99.0, "columns": 99.0, "ffn": 99.0, "layers": 97.0}
SECONDS = 1.0


def cells(row: Row) -> list[str]:
    """A row of the table."""
    traced = "refused" if row.refusal else "yes"
    tallies = [str(getattr(row, name)) for name in TALLIES]
    false = str(row.false) if row.false else ""
    return [row.name, row.group, traced, *tallies, false, "" if row.refusal else f"{row.seconds:.2f}"]


def totals(rows: Sequence[Row]) -> dict[str, Tally]:
    """The sums of the columns."""
    sums = {name: Tally() for name in TALLIES}
    for row in rows:
        for name, total in sums.items():
            one: Tally = getattr(row, name)
            total.found += one.found
            total.expected += one.expected
    return sums


def shortfalls(rows: Sequence[Row]) -> list[str]:
    """What the totals fail to reach, one line each."""
    found = [
        f"{name}: {total} is {total.percent:.1f} %, below {REACH[name]} %"
        for name, total in totals(rows).items()
        if name in REACH and total.expected and total.percent < REACH[name]
    ]
    false = [row.name for row in rows if row.false]
    return [*found, *([f"attention found where there is none: {', '.join(false)}"] if false else [])]


def summary(rows: Sequence[Row]) -> list[str]:
    """The totals in words."""
    traced = [row for row in rows if not row.refusal]
    slow = [f"{row.name} {row.seconds:.1f} s" for row in traced if row.seconds > SECONDS]
    return [
        f"{len(rows)} models, {len(traced)} traced, {len(rows) - len(traced)} refused with a reason, "
        f"{sum(row.false for row in rows)} false attention sites",
        ", ".join(f"{name} {total} ({total.percent:.1f} %)" for name, total in totals(rows).items() if total.expected),
        f"slower than {SECONDS:.0f} s: {', '.join(slow) or 'none'}",
    ]


def reasons(rows: Iterable[Row]) -> list[tuple[str, str]]:
    """Model and reason, for every refusal and every miss."""
    found: list[tuple[str, str]] = []
    for row in rows:
        if row.refusal:
            found.append((row.name, re.sub(r"\S*site-packages/", "", " ".join(row.refusal.split()))))
        found += [(row.name, miss) for miss in row.misses]
    return found


def show(rows: Sequence[Row], console: Console) -> None:
    """The table, the misses and the totals on a terminal."""
    table = Table(*TITLES, title="zoo", box=None, pad_edge=False)
    for row in rows:
        table.add_row(*cells(row))
    console.print(table)
    for name, reason in reasons(rows):
        console.print(f"{name}: {reason[:300]}", markup=False, highlight=False)
    for line in summary(rows):
        console.print(line, markup=False, highlight=False)


def write(rows: Sequence[Row], path: Path) -> None:
    """The report as Markdown."""
    lines = ["# Zoo", "", *(f"- {line}" for line in summary(rows)), "", "| " + " | ".join(TITLES) + " |"]
    lines.append("|" + " --- |" * len(TITLES))
    lines += ["| " + " | ".join(cells(row)) + " |" for row in rows]
    lines += ["", "## Refusals and misses", ""]
    lines += [f"- {name}: {reason}" for name, reason in reasons(rows)]
    path.write_text("\n".join(lines) + "\n")
