"""Shortens and colours the text diff of a program for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.text import Text

if TYPE_CHECKING:
    import peftgraph as pg


def first_layer_diff(tuned: pg.Program, program: pg.Program) -> str:
    """Return the diff of the first layer that an edit touches; the whole diff where no edit is in a layer."""
    lines = tuned.diff(program).splitlines()
    by_id = {site.id: site for site in program.sites}
    first = next((by_id[edit.site] for edit in tuned.edits if by_id[edit.site].layer is not None), None)
    if first is None:
        return "\n".join(lines)
    prefix = f"%{first.stack + '.' if first.stack else ''}{first.layer}."
    body = [line for line in lines if line[:4].strip() in ("", "+", "-") and line.startswith("  ")]
    shown = [line for line in body if line[4:].startswith(prefix)]
    if not shown:
        return "\n".join(lines)
    heading = [line for line in lines[:-1] if line not in body]
    hidden = len(body) - len(shown)
    note = [f"    ... {hidden} more lines like these in the other layers"] if hidden else []
    return "\n".join([*heading, *shown, *note, lines[-1]])


def coloured(diff: str) -> Text:
    """Colour a diff for the terminal: added lines green, removed ones red."""
    styles = {"+": "green", "-": "red"}
    text = Text()
    for line in diff.splitlines():
        heading = not line.startswith(" ")
        text.append(line + "\n", style="bold" if heading else styles.get(line[2:3], "dim"))
    return text
