"""Shortens and colours the text diff of a program for the terminal."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from rich.text import Text

if TYPE_CHECKING:
    import peftgraph as pg


LAYER = re.compile(r"%(?:[A-Za-z_]\w*\.)?\d+\.")  # how the names of a layer's values begin


def first_layer_diff(tuned: pg.Program, program: pg.Program) -> str:
    """Return the diff of some layers, which between them show all that the passes do: for each pass and each role of
    its sites, the first layer with an edit; and every change outside the layers.

    The whole diff is returned where no edit is in a layer.
    """
    lines = tuned.diff(program).splitlines()
    prefixes = _first_layers(tuned, program)
    body = [line for line in lines if line[:4].strip() in ("", "+", "-") and line.startswith("  ")]
    shown = [line for line in body if _is_shown(line, prefixes)]
    if not prefixes or not shown:
        return "\n".join(lines)
    heading = [line for line in lines[:-1] if line not in body]
    hidden = sum(LAYER.match(line[4:]) is not None for line in body) - sum(
        line[4:].startswith(prefixes) for line in shown
    )
    note = [f"    ... {hidden} more lines like these in the other layers"] if hidden else []
    return "\n".join([*heading, *shown, *note, lines[-1]])


def _first_layers(tuned: pg.Program, program: pg.Program) -> tuple[str, ...]:
    """Return how the names of the values begin in the first layer of each pass and role."""
    by_id = {site.id: site for site in program.sites}
    found: dict[tuple[int, str], str] = {}
    for edit in tuned.edits:
        site = by_id.get(edit.site)
        if site is not None and site.layer is not None:
            prefix = f"%{site.stack + '.' if site.stack else ''}{site.layer}."
            found.setdefault((edit.application, site.role), prefix)
    return tuple(dict.fromkeys(found.values()))


def _is_shown(line: str, prefixes: tuple[str, ...]) -> bool:
    """Tell lines of the chosen layers, and changes outside all layers, from the rest."""
    if LAYER.match(line[4:]):
        return line[4:].startswith(prefixes)
    return line[:4].strip() != ""


def coloured(diff: str) -> Text:
    """Colour a diff for the terminal: added lines green, removed ones red."""
    styles = {"+": "green", "-": "red"}
    text = Text()
    for line in diff.splitlines():
        heading = not line.startswith(" ")
        text.append(line + "\n", style="bold" if heading else styles.get(line[2:3], "dim"))
    return text
