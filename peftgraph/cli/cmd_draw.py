"""`peftgraph draw`: draws a model, or what a recipe does to one of its blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peftgraph.cli.caching import caching
from peftgraph.cli.cmd_inspect import Source
from peftgraph.cli.options import Json
from peftgraph.model_folders.loading import check_source, skeleton, trace
from peftgraph.terminal.console import emit, say, working


def draw(
    ctx: typer.Context,
    source: Source,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The picture: .svg, .pdf or .png.")],
    recipe: Annotated[
        str, typer.Option("--recipe", "-r", help="Draw what it does: a TOML file, or a spec such as 'lora{rank=8}'.")
    ] = "",
    layer: Annotated[
        int | None,
        typer.Option("--layer", help="With --recipe: the block; -1 is the last. By default the first changed."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Draw a model, each distinct block once; or one block with what a recipe puts into it. No weights are loaded."""
    if layer is not None and not recipe:
        raise typer.BadParameter("--layer is the block that --recipe is drawn in")
    from peftgraph.rewrite.recipe_check import check_recipe

    check_source(source)
    if recipe:
        check_recipe(recipe)
    import peftgraph as pg
    from peftgraph.draw import check_suffix

    check_suffix(out)
    method = pg.load_recipe(recipe) if recipe else None
    program = trace(skeleton(source), cache=caching(ctx))
    with working("drawing"):
        picture = program.drawing() if method is None else program.apply(method).picture(layer=layer)
        picture.save(out)
    if as_json:
        emit({"file": str(out), "bytes": out.stat().st_size})
    else:
        say(f"picture written to {out}", "bold")
