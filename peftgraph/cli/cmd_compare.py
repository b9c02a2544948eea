"""`peftgraph compare`: shows what recipes cost on a model, from its configuration alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from peftgraph.cli.caching import caching
from peftgraph.cli.cmd_inspect import Source
from peftgraph.cli.options import Json
from peftgraph.model_folders.loading import check_source, skeleton, trace
from peftgraph.terminal.console import RESULT, say, working
from peftgraph.utils.atomic_files import atomic_file

if TYPE_CHECKING:
    from peftgraph.costs.comparison import Comparison


def compare(
    ctx: typer.Context,
    source: Source,
    recipes: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RECIPE]...", help="More recipes, after the first one of --recipes.", show_default=False
        ),
    ] = None,
    first: Annotated[
        list[str],
        typer.Option(
            "--recipes",
            "-r",
            metavar="RECIPE",
            help="TOML files, specs such as 'lora{rank=8}', or words alone such as ia3; several after one --recipes.",
        ),
    ] = [],  # noqa: B006
    batch: Annotated[int, typer.Option(help="Rows of every input.", min=1)] = 8,
    length: Annotated[int, typer.Option(help="Tokens of every sequence.", min=1)] = 128,
    examples: Annotated[int, typer.Option(help="Also: the cost of so many examples in a prompt.", min=0)] = 0,
    as_json: Json = False,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write a page with the picture.")] = None,
) -> None:
    """Show what each recipe costs: parameters, files, memory of training, operations. No weights are loaded."""
    chosen = [*first, *(recipes or [])]
    if not chosen:
        raise typer.BadParameter("name at least one recipe, such as --recipes lora ia3")
    from peftgraph.rewrite.recipe_check import check_recipe

    check_source(source)
    for one in chosen:
        check_recipe(one)
    import peftgraph as pg
    from peftgraph.rewrite.recipe import load_recipe

    for one in chosen:  # mistakes are told before the model is traced
        load_recipe(one)
    program = trace(skeleton(source), cache=caching(ctx))
    with working("comparing"):
        found = pg.compare(program, chosen, batch=batch, length=length, examples=examples)
    if html is not None:
        with atomic_file(html) as temporary:
            temporary.write_text(found.html(), encoding="utf-8")
    if as_json:
        typer.echo(found.json())
        return
    _show(found)
    if html is not None:
        say(f"page written to {html}", "bold")


def _show(found: Comparison) -> None:
    """Print a comparison: turned for a terminal's width, one row a recipe in a pipe."""
    from peftgraph.terminal.tables import comparison_table

    say(found.title, "bold")
    say(found.facts, "dim")
    say("")
    if RESULT.is_terminal:
        RESULT.print(comparison_table(found))
        say("\n".join(found.notes()))
    else:
        typer.echo("\n".join(str(found).splitlines()[3:]))
