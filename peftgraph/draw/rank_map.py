"""The ranks of a program's changes, by layer and role: as text, and as a drawing in which darker is more."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from html import escape

CELL_WIDTH, CELL_HEIGHT, LABEL, TOP = 64, 26, 150, 34
STYLE = """
.ranks { --ink: #1f2430; --more: #1f6f8b; font: 13px system-ui, sans-serif; }
@media (prefers-color-scheme: dark) { .ranks { --ink: #e6e8ee; --more: #66b8d1; } }
.ranks text { fill: var(--ink); } .ranks rect { fill: var(--more); stroke: var(--ink); stroke-opacity: .15; }
"""


@dataclass(frozen=True)
class RankMap:
    """The rank of the change at each layer and role; prints as a table, shows as a drawing in a notebook.

    Attributes:
        rows: the layers, such as "encoder 3", in order.
        columns: the roles, in order.
        ranks: by row and column; nothing where nothing changes.
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    ranks: dict[tuple[str, str], int]

    @classmethod
    def of(cls, found: Iterable[tuple[str, str, int]]) -> RankMap:
        """Make a map of (layer, role, rank), in the order in which layers and roles come; the largest rank counts."""
        ranks: dict[tuple[str, str], int] = {}
        for row, column, rank in found:
            ranks[row, column] = max(rank, ranks.get((row, column), 0))
        return cls(tuple(dict.fromkeys(row for row, _ in ranks)), tuple(dict.fromkeys(one for _, one in ranks)), ranks)

    def __str__(self) -> str:
        cells = [["layer", *self.columns]]
        cells += [[row, *(str(self.ranks.get((row, one), "")) for one in self.columns)] for row in self.rows]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ("  ".join([row[0].ljust(widths[0]), *(map(str.rjust, row[1:], widths[1:]))]) for row in cells)
        return "\n".join(line.rstrip() for line in lines)

    @property
    def svg(self) -> str:
        """The drawing."""
        width, height = LABEL + CELL_WIDTH * len(self.columns) + 10, TOP + CELL_HEIGHT * len(self.rows) + 10
        most = max(self.ranks.values(), default=0) or 1
        parts = [
            f'<text x="{LABEL + CELL_WIDTH * (j + 0.5)}" y="{TOP - 12}" text-anchor="middle">'
            f"{escape(one.rpartition('.')[2])}</text>"
            for j, one in enumerate(self.columns)
        ]
        for i, row in enumerate(self.rows):
            y = TOP + CELL_HEIGHT * i
            parts.append(f'<text x="{LABEL - 10}" y="{y + 17}" text-anchor="end">{escape(row)}</text>')
            for j, column in enumerate(self.columns):
                if (row, column) in self.ranks:
                    parts.append(self._cell(LABEL + CELL_WIDTH * j, y, self.ranks[row, column], most))
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" class="ranks" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}"><title>Rank of the change</title><style>{STYLE}</style>'
            f"{''.join(parts)}</svg>"
        )

    @staticmethod
    def _cell(x: int, y: int, rank: int, most: int) -> str:
        opacity = 0.05 + 0.6 * rank / most
        return (
            f'<rect x="{x}" y="{y}" width="{CELL_WIDTH}" height="{CELL_HEIGHT}" fill-opacity="{opacity:.2f}"/>'
            f'<text x="{x + CELL_WIDTH / 2}" y="{y + 17}" text-anchor="middle">{rank}</text>'
        )

    def _repr_html_(self) -> str:
        return self.svg
