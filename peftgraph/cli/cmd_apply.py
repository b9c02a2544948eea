"""`peftgraph apply`: shows what a recipe does to a model, and writes a fresh adapter of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from peftgraph.cli.caching import caching
from peftgraph.cli.cmd_inspect import Source
from peftgraph.model_folders.loading import check_source, load, skeleton, trace
from peftgraph.terminal.console import OUT, working
from peftgraph.terminal.diffs import coloured, first_layer_diff

if TYPE_CHECKING:
    import peftgraph as pg


def apply(
    ctx: typer.Context,
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
    """Show what a recipe does: the diff of the first layer it touches, the counts, and whether it folds."""
    from peftgraph.rewrite.recipe_check import check_recipe

    check_source(source, weights=out is not None)
    check_recipe(recipe)
    import torch

    import peftgraph as pg
    from peftgraph.terminal.tables import count_table

    method = pg.load_recipe(recipe)
    program = trace(skeleton(source) if out is None else load(source), cache=caching(ctx))
    torch.manual_seed(seed)
    with working("applying"):
        tuned = program.apply(method)
    OUT.print(coloured(first_layer_diff(tuned, program)))
    OUT.print(count_table(tuned.count()))
    OUT.print()
    OUT.print(foldability(tuned), highlight=False, markup=False)
    if out is not None:
        tuned.save_adapter(out)
        OUT.print(f"adapter written to {out}", style="bold", highlight=False)


def foldability(tuned: pg.Program) -> str:
    """Say whether the recipe folds, with a line for each reason why it does not."""
    import peftgraph as pg

    try:
        pg.fold(tuned)
    except pg.NoFold as refusal:
        return "does not fold completely:\n  " + "\n  ".join(refusal.reasons)
    return "folds completely: nothing of the recipe is left in the merged graph"
