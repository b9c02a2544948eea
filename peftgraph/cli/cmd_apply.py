"""`peftgraph apply`: what a recipe does to a model, and a fresh adapter of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from peftgraph.cli.cmd_inspect import Source
from peftgraph.cli.console import OUT, working

if TYPE_CHECKING:
    import peftgraph as pg


def apply(
    source: Source,
    recipe: Annotated[
        str, typer.Option("--recipe", "-r", help="A TOML file, or the text of a spec such as 'lora{rank=8}'.")
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Write a freshly initialised adapter (needs weights)."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the adapter's initial values.")] = 0,
) -> None:
    """Shows what a recipe does: the diff of the first layer it touches, the counts, and whether it folds."""
    import torch

    import peftgraph as pg
    from peftgraph.cli.models import load, skeleton, trace
    from peftgraph.cli.tables import count_table

    method = pg.load_recipe(recipe)
    program = trace(skeleton(source) if out is None else load(source))
    torch.manual_seed(seed)
    with working("applying"):
        tuned = program.apply(method)
    OUT.print(coloured(first_layer(tuned, program)))
    OUT.print(count_table(tuned.count()))
    OUT.print()
    OUT.print(folding(tuned), highlight=False, markup=False)
    if out is not None:
        tuned.save_adapter(out)
        OUT.print(f"adapter written to {out}", style="bold", highlight=False)


def first_layer(tuned: pg.Program, program: pg.Program) -> str:
    """The diff of the first layer that an edit touches; all of it where no edit has a layer."""
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
    """A diff in colour."""
    styles = {"+": "green", "-": "red"}
    text = Text()
    for line in diff.splitlines():
        heading = not line.startswith(" ")
        text.append(line + "\n", style="bold" if heading else styles.get(line[2:3], "dim"))
    return text


def folding(tuned: pg.Program) -> str:
    """Whether the recipe folds, in a line for each reason against."""
    import peftgraph as pg

    try:
        pg.fold(tuned)
    except pg.NoFold as refusal:
        return "does not fold completely:\n  " + "\n  ".join(refusal.reasons)
    return "folds completely: nothing of the recipe is left in the merged graph"
