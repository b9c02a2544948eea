"""Programs as rich tables: the sites by layer, and the parameters counted in each way."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.table import Table

if TYPE_CHECKING:
    import peftgraph as pg

COLOURS = {
    "attention": "cyan",
    "ffn": "green",
    "norm": "magenta",
    "bias": "yellow",
    "embedding": "blue",
    "head": "red",
}


@dataclass(frozen=True)
class Row:
    """What identical sites of a layer share."""

    role: str
    kind: str
    path: str
    columns: str
    shape: str


@dataclass(frozen=True)
class Group:
    """Layers that follow each other in a stack and look alike; `last` is None outside of every layer."""

    stack: str
    first: int | None
    last: int | None
    rows: tuple[tuple[Row, int], ...]

    @property
    def title(self) -> str:
        """Such as "encoder layers 0-11"."""
        if self.first is None:
            return "outside of layers"
        layers = f"layer {self.first}" if self.first == self.last else f"layers {self.first}-{self.last}"
        return f"{self.stack} {layers}".strip()

    @property
    def prefix(self) -> str:
        """The start that all paths of the layers share, up to the layer's number."""
        paths = [row.path.split(".") for row, _ in self.rows if row.path]
        shared = list(itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False)))
        return ".".join(parts[0] for parts in shared) if self.first is not None and len(paths) > 1 else ""


def groups(sites: Iterable[pg.Site], collapse: bool = True) -> list[Group]:
    """The sites by stack and layer, in graph order; layers that look alike become one group."""
    layers: dict[tuple[str, int | None, int], list[pg.Site]] = {}
    for site in sites:
        last = next(reversed(layers), None)
        key = (site.stack or "", site.layer, 0)
        if site.layer is None:  # what stands before, between and after the layers stays there
            key = last if last is not None and last[1] is None else ("", None, len(layers))
        layers.setdefault(key, []).append(site)
    found: list[Group] = []
    for (stack, layer, _), members in layers.items():
        rows = tuple(Counter(_row(site, collapse) for site in members).items())
        before = next((g for g in reversed(found) if g.stack == stack and g.first is not None), None)
        if collapse and before is not None and layer is not None and before.rows == rows and before.last == layer - 1:
            found[found.index(before)] = Group(stack, before.first, layer, rows)
        else:
            found.append(Group(stack, layer, layer, rows))
    return found


def _row(site: pg.Site, collapse: bool) -> Row:
    shape = "" if site.shape is None else " x ".join(map(str, site.shape))
    columns = "" if site.columns is None else str(site.columns)
    if collapse and site.role == "bias":
        return Row("bias", "", "", "", "")
    path = site.path
    if collapse and site.layer is not None:
        parts = path.split(".")
        number = next((i for i, part in enumerate(parts) if part == str(site.layer)), None)
        path = path if number is None else ".".join((*parts[:number], "*", *parts[number + 1 :]))
    expert = "" if collapse or site.expert is None else f"[expert {site.expert}]"
    return Row(site.role + expert, site.kind or "", path, columns, shape)


def sites_table(sites: Sequence[pg.Site], title: str, collapse: bool = True) -> Table:
    """The sites as a table with a section for each group of layers."""
    table = Table(title=title, title_justify="left", title_style="bold", header_style="dim", box=None, pad_edge=False)
    cells = {
        "kind": any(site.kind == "cross" for site in sites),
        "columns": any(site.columns is not None for site in sites),
    }
    names = ["role", *(name for name in ("kind", "path", "columns", "out x in") if cells.get(name, True))]
    for name in names:
        table.add_column(name, justify="right" if name == "out x in" else "left", overflow="fold")
    for group in groups(sites, collapse):
        prefix = group.prefix
        table.add_row(f"[bold]{group.title}[/]", *(f"[dim]{prefix}[/]" if name == "path" else "" for name in names[1:]))
        for row, count in group.rows:
            table.add_row(*_cells(row, count, prefix, names))
        table.add_row()
    return table


def _cells(row: Row, count: int, prefix: str, names: Sequence[str]) -> list[str]:
    path = row.path.removeprefix(prefix) if prefix else row.path
    shown = {
        "role": f"  [{colour(row.role)}]{row.role}[/]" + (f" [dim]x{count}[/]" if count > 1 else ""),
        "kind": row.kind,
        "path": "[dim](all of them)[/]"
        if row == Row("bias", "", "", "", "")
        else path.removeprefix(".") or "[dim](itself)[/]",
        "columns": row.columns,
        "out x in": row.shape,
    }
    return [shown[name] for name in names]


def colour(role: str) -> str:
    """The colour of a role."""
    return COLOURS.get(role.split(".")[0], "white")


def count_table(count: Any) -> Table:
    """The parameters of a program, counted in each way."""
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
    for name, values, meaning in count_rows(count):
        table.add_row(name, f"{values:,}", f"{100 * values / max(1, count.total):.3f} %", meaning)
    return table


def count_rows(count: Any) -> list[tuple[str, int, str]]:
    """The rows of the table of counts: name, values, meaning."""
    return [
        ("trainable", count.trainable, "moved by training"),
        ("added", count.added, "parameters that the recipe adds; none are left after folding"),
        ("changed", count.changed, f"base weights that folding rewrites: {ranks(count)}"),
        ("total", count.total, "the base's own, tied ones once"),
    ]


def ranks(count: Any) -> str:
    """The ranks of a program's changes, in words."""
    return str(count).rpartition("changes: ")[2]


def layout(sites: Iterable[pg.Site]) -> str:
    """Where the norms stand, over all blocks: "pre-norm", "post-norm"."""
    found = sorted({site.layout for site in sites if site.layout is not None})
    return ", ".join(f"{name}-norm" for name in found) or "unknown"
