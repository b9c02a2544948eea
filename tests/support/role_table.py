"""The tables of roles and ports of docs/sites.md, written from the registry: `python tests/support/role_table.py`."""

from __future__ import annotations

from pathlib import Path

from peftgraph.sites.ports import PORTS
from peftgraph.sites.roles import GROUPS, ROLES

PAGE = Path(__file__).parents[2] / "docs" / "sites.md"
BEGIN, END = "<!-- roles: written by tests/support/role_table.py -->\n", "<!-- end of roles -->\n"


def tables() -> str:
    """Return the tables, between the marks that hold their place in the page."""
    lines = ["| role | meaning | selected by | ports |", "|---|---|---|---|"]
    for one in ROLES:
        words, ports = (", ".join(f"`{name}`" for name in names) for names in (one.words, one.ports))
        lines.append(f"| `{one.name}` | {one.meaning} | {words} | {ports} |")
    lines += ["", "| word for several roles | what it selects |", "|---|---|"]
    lines += [f"| `{one.name}` | {one.meaning} |" for one in GROUPS]
    lines += ["", "| port | kind | value |", "|---|---|---|"]
    lines += [f"| `{one.name}` | {one.kind} | {one.meaning} |" for one in PORTS.values()]
    return "\n".join([BEGIN, *lines, "", END])


def rewritten(page: str) -> str:
    """Return the page with the tables of the registry."""
    before, _, rest = page.partition(BEGIN)
    return before + tables() + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(rewritten(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
