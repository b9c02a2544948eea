"""The picture of docs/design.md: which room imports which; `python tests/support/rooms_picture.py` writes it.

Rooms are in the order of the table in `pyproject.toml`; an arc is an import, where no chain of others implies it.
"""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import networkx as nx

ROOT = Path(__file__).parents[2]
FILE = ROOT / "docs" / "rooms.svg"
ROW, WIDTH, LEFT, TOP = 30, 130, 16, 16
STYLE = (
    "text{font:13px sans-serif;fill:#263238}rect{fill:#eceff1;stroke:#78909c}path{fill:none;stroke:#546e7a}"
    "@media(prefers-color-scheme:dark){text{fill:#eceff1}rect{fill:#37474f;stroke:#90a4ae}path{stroke:#b0bec5}}"
)


def rooms() -> list[str]:
    """The rooms, the highest first."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    return next(one["layers"] for one in contracts if one["containers"] == ["peftgraph"])


def imports() -> nx.DiGraph:
    """The imports between rooms, without those that others imply."""
    known = rooms()
    graph: nx.DiGraph = nx.DiGraph()
    graph.add_nodes_from(known)
    for path in (ROOT / "peftgraph").rglob("*.py"):
        room = path.relative_to(ROOT / "peftgraph").parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            parts = [name.split(".") for name in names if name.startswith("peftgraph.")]
            graph.add_edges_from((room, part[1]) for part in parts if {room, part[1]} <= {*known} and part[1] != room)
    return nx.transitive_reduction(graph)


def picture() -> str:
    """The picture as SVG."""
    known, graph = rooms(), imports()
    middle = {room: TOP + i * ROW + 11 for i, room in enumerate(known)}
    lines: list[str] = []
    for room in known:
        y = middle[room]
        lines.append(f'<rect x="{LEFT}" y="{y - 11}" width="{WIDTH}" height="22" rx="5"/>')
        lines.append(f'<text x="{LEFT + WIDTH / 2:g}" y="{y + 5}" text-anchor="middle">{room}</text>')
    right = LEFT + WIDTH
    for start, end in sorted(graph.edges, key=lambda edge: (middle[edge[0]], middle[edge[1]])):
        a, b = middle[start], middle[end]
        out = right + 16 + 0.42 * (b - a)
        lines.append(f'<path d="M{right} {a + 3}C{out:g} {a + 3} {out:g} {b - 3} {right + 5} {b - 3}"/>')
        lines.append(f'<path d="M{right + 8} {b - 6}L{right + 1} {b - 3}L{right + 8} {b}"/>')
    longest = max(middle[end] - middle[start] for start, end in graph.edges)
    size = (round(right + 40 + 0.34 * longest), 2 * TOP + len(known) * ROW - 8)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size[0]} {size[1]}" width="{size[0]}">'
    return "\n".join([head, f"<style>{STYLE}</style>", *lines, "</svg>", ""])


if __name__ == "__main__":
    FILE.write_text(picture(), encoding="utf-8")
