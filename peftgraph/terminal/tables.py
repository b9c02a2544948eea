"""Renders programs as rich tables: the parts of the model, its sites one by one, and the counts of parameters."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from peftgraph.sites.roles import role_of

if TYPE_CHECKING:
    import peftgraph as pg
    from peftgraph.costs.comparison import Comparison
    from peftgraph.draw import Outline
    from peftgraph.draw.layer_table import Section
    from peftgraph.draw.model_outline import Component

HEADINGS = ("role", "weight", "out x in", "heads", "notes")


class OutlineTable:
    """Renders the parts of a model: a section for each distinct block and for the parts around the blocks.

    The columns of all sections are aligned; names and notes wrap to fit the terminal's width.
    """

    def __init__(self, outline: Outline) -> None:
        from peftgraph.draw.layer_table import sections

        self.outline, self.sections = outline, sections(outline)
        self.rows = [[_cells(part, _prefix(section)) for part in section.components] for section in self.sections]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        widths = self._widths(options.max_width)
        yield Text(self.outline.model, style="bold")
        yield Text(" · ".join(self.outline.facts()))
        yield Text("")
        yield _grid([[Text(name, style="dim") for name in HEADINGS]], widths)
        for section, rows in zip(self.sections, self.rows, strict=True):
            times = f"  x {section.times}" if section.times > 1 else ""
            title = Text.assemble((section.title + times, "bold"), "  ", (_prefix(section), "dim"))
            detail = [Padding(Text(section.detail, style="dim"), (0, 0, 0, 2))] if section.detail else []
            yield Group(title, *detail, _grid(rows, widths), "")
        yield from self._unmatched()

    def _widths(self, available: int) -> list[int]:
        every = [[cell.cell_len for cell in row] for rows in self.rows for row in rows] or [[0] * len(HEADINGS)]
        widths = [max(len(name), *column) for name, column in zip(HEADINGS, zip(*every, strict=True), strict=True)]
        spare = available - 2 * (len(widths) - 1) - widths[0] - widths[2] - widths[3]
        notes = min(widths[4], max(spare - widths[1], 16))
        return [widths[0], max(12, min(widths[1], spare - notes)), widths[2], widths[3], notes]

    def _unmatched(self) -> Iterable[RenderableType]:
        unmatched = self.outline.unmatched
        if unmatched:
            yield Text(f"projections without a role ({len(unmatched)})", style="bold yellow")
        for one in unmatched[:8]:
            yield Padding(Text(f"{one.id} at {one.path}" + (f": {one.reason}" if one.reason else "")), (0, 0, 0, 2))
        if len(unmatched) > 8:
            yield Padding(Text(f"and {len(unmatched) - 8} more", style="dim"), (0, 0, 0, 2))
        for reason in self.outline.reasons:
            yield Text(reason, style="yellow")


def _grid(rows: Sequence[Sequence[Text]], widths: Sequence[int]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for name, width in zip(HEADINGS, widths, strict=True):
        right = name in ("out x in", "heads")
        table.add_column(width=width, justify="right" if right else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _prefix(section: Section) -> str:
    """Return the path components that all paths of a section begin with, but never a whole path."""
    paths = [part.path.split(".")[:-1] for part in section.components if part.path]
    if len(section.components) < 3:
        return ""
    shared = itertools.takewhile(lambda words: len(set(words)) == 1, zip(*paths, strict=False))
    return ".".join(words[0] for words in shared)


def _cells(part: Component, prefix: str) -> list[Text]:
    from peftgraph.draw.layer_table import notes

    path = part.path.removeprefix(f"{prefix}.") if prefix else part.path
    heads = f"{part.heads} x {part.head_dim}" if part.heads and part.head_dim else ""
    said = ", ".join(notes(part)).replace(" × ", " x ")
    return [
        Text(f"  {part.role}", style=colour(part.role)),
        Text(path),
        Text(" x ".join(map(str, part.shape or ()))),
        Text(heads),
        Text(said, style="dim"),
    ]


def listing(sites: Sequence[pg.Site], every: bool = False) -> Table:
    """Render sites as rows; sites that differ only by their layer share a row, unless `every` is set."""
    from peftgraph.draw.collect_outline import starred
    from peftgraph.sites.explanations.listing import ranges

    table = Table(header_style="dim", box=None, pad_edge=False)
    for name in ("site", *(() if every else ("layers",)), "weight", "columns", "out x in"):
        table.add_column(name, justify="right" if name == "out x in" else "left", overflow="fold")
    for members in _alike(sites, every):
        one = members[0]
        layers = sorted({site.layer for site in members if site.layer is not None})
        table.add_row(
            Text(one.id if every else _title(one), style=colour(one.role)),
            *(() if every else (f"{ranges(layers)}" if layers else "",)),
            Text(one.path if every else starred(one)),
            "" if one.columns is None else str(one.columns),
            " x ".join(map(str, one.shape or ())),
        )
    return table


def _title(site: pg.Site) -> str:
    """Return a site's id without its layer."""
    words = (site.stack, "cross" if site.kind == "cross" else None, site.role)
    return ".".join(word for word in words if word)


def _alike(sites: Sequence[pg.Site], every: bool) -> list[list[pg.Site]]:
    from peftgraph.draw.collect_outline import starred

    found: dict[object, list[pg.Site]] = {}
    for site in sites:
        key = site.id if every else (_title(site), starred(site), str(site.columns), site.shape)
        found.setdefault(key, []).append(site)
    return list(found.values())


def colour(role: str) -> str:
    """Return the colour of a role in a terminal."""
    known = role_of(role)
    return known.colour if known is not None and known.colour else "white"


def count_table(count: Any, left: int | None = None) -> Table:
    """Render the parameters of a program, counted in each way.

    Args:
        count: of the program.
        left: how many of the added ones folding leaves; None where that is not known.
    """
    table = Table(
        title="parameters, counted in each way",
        title_justify="left",
        title_style="bold",
        header_style="dim",
        box=None,
    )
    table.add_column("count")
    table.add_column("values", justify="right")
    table.add_column("of the base", justify="right")
    table.add_column("meaning", style="dim")
    for name, values, meaning in count_rows(count, left):
        table.add_row(name, f"{values:,}", f"{100 * values / max(1, count.total):.3f} %", meaning)
    return table


def count_rows(count: Any, left: int | None = None) -> list[tuple[str, int, str]]:
    """Return the rows of the table of counts: name, values, meaning."""
    after = {None: "", 0: "; none are left after folding"}.get(left, f"; {left or 0:,} are left after folding")
    after = after if count.added else ""
    return [
        ("trainable", count.trainable, "moved by training"),
        ("added", count.added, f"parameters that the recipe adds{after}"),
        ("changed", count.changed, f"base weights that folding rewrites: {ranks(count)}"),
        ("total", count.total, "the base's own, tied ones once"),
    ]


def ranks(count: Any) -> str:
    """Return the ranks of a program's changes, in words."""
    return str(count).rpartition("changes: ")[2]


def layout(sites: Iterable[pg.Site]) -> str:
    """Return the positions of the norms over all blocks: "pre-norm", "post-norm"."""
    found = sorted({site.layout for site in sites if site.layout is not None})
    return ", ".join(f"{name}-norm" for name in found) or "unknown"


def comparison_table(found: Comparison) -> Table:
    """Return a comparison of recipes as a table: a row for each quantity, a column for each recipe."""
    head, *rows = found.cells()
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for row in rows:
        table.add_column(row[0], justify="right", overflow="fold")
    for i, name in enumerate(head[1:], start=1):
        table.add_row(Text(name, style="dim"), *(row[i] for row in rows))
    return table
