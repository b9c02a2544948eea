"""`peftgraph apply`: shows what a recipe does to a model, and writes a fresh adapter of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peftgraph.cli.caching import caching
from peftgraph.cli.cmd_inspect import Source
from peftgraph.cli.options import Json
from peftgraph.cli.wording import in_options
from peftgraph.model_folders.loading import check_source, load, skeleton, trace
from peftgraph.terminal.console import RESULT, emit, say, working
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
    as_json: Json = False,
) -> None:
    """Show what a recipe does: the diff of the layers that show it all, the counts, and whether it folds."""
    from peftgraph.rewrite.recipe_check import check_recipe

    check_source(source, weights=out is not None)
    check_recipe(recipe)
    with working("importing torch"):
        import torch

        import peftgraph as pg

    method = pg.load_recipe(recipe)
    program = trace(skeleton(source) if out is None else load(source), cache=caching(ctx))
    torch.manual_seed(seed)
    with working("applying"):
        tuned = program.apply(method)
    with working("folding, on shapes" if out is None else "folding, with proof"):
        folded, reasons = fold_all_that_folds(tuned)
    if out is not None:
        tuned.save_adapter(out)
    if as_json:
        emit(as_document(tuned, program, folded, reasons) | {"adapter": None if out is None else str(out)})
        return
    _show(tuned, program, folded, reasons)
    if out is not None:
        say(f"adapter written to {out}", "bold")


def _show(tuned: pg.Program, program: pg.Program, folded: pg.Program, reasons: list[str]) -> None:
    from peftgraph.terminal.tables import count_table

    RESULT.print(coloured(first_layer_diff(tuned, program)), soft_wrap=True)
    RESULT.print(count_table(tuned.count(), left=folded.count().added))
    say(f"\n{foldability(tuned, folded, reasons)}")


def fold_all_that_folds(tuned: pg.Program) -> tuple[pg.Program, list[str]]:
    """Return the program with everything folded that can be, and a reason for each edit that cannot."""
    import peftgraph as pg

    try:
        return pg.fold(tuned), []
    except pg.NoFold as refusal:
        return pg.fold(tuned, partial=True), refusal.reasons


def foldability(tuned: pg.Program, folded: pg.Program, reasons: list[str]) -> str:
    """Say whether the recipe folds, and what is left if it does not, with a line for each reason."""
    if not reasons:
        return "folds completely: nothing of the recipe is left in the merged graph"
    some = len(folded.edits) < len(tuned.edits)
    kept = f"{len(folded.edits)} of {len(tuned.edits)} edits stay" if some else "no edit folds"
    return in_options(f"does not fold completely, {kept}:\n  " + "\n  ".join(reasons))


def as_document(tuned: pg.Program, program: pg.Program, folded: pg.Program, reasons: list[str]) -> dict[str, Any]:
    """Return what a recipe does, for --json."""
    count = tuned.count()
    counts = {name: getattr(count, name) for name in ("trainable", "added", "changed", "total", "state")}
    return {
        "model": tuned.model,
        "recipe": [str(applied.method) for applied in tuned.history],
        "parameters": {**counts, "percent": count.percent, "left_after_folding": folded.count().added},
        "sites": [{"site": edit.site, "pass": edit.application} for edit in tuned.edits],
        "folds": not reasons,
        "reasons": [in_options(reason) for reason in reasons],
        "diff": str(tuned.diff(program)),
    }
