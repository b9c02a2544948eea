"""`peftgraph sweep`: trains variants of a recipe together, over one frozen base."""

from __future__ import annotations

import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer

from peftgraph.cli.caching import caching
from peftgraph.cli.cmd_train import check_tools
from peftgraph.cli.options import Json
from peftgraph.errors import PeftGraphError
from peftgraph.experiments.examples import read_examples
from peftgraph.experiments.folder import check_folder
from peftgraph.experiments.settings import read_settings
from peftgraph.model_folders.loading import check_source
from peftgraph.terminal.console import emit, say


def sweep(
    ctx: typer.Context,
    source: Annotated[Path | None, typer.Argument(metavar="[DIR]", help="A local transformers folder.")] = None,
    recipe: Annotated[
        str, typer.Option("--recipe", "-r", help="A TOML file, a spec such as 'lora{rank=8}', or a word such as ia3.")
    ] = "lora",
    vary: Annotated[
        list[str] | None,
        typer.Option("--vary", metavar="OPTION=A,B", help="Values of an option of the recipe, or of lr; repeatable."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", metavar="FILE", help="The examples, a JSON object on each line.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="The folder that is written.")] = None,
    task: Annotated[
        str | None, typer.Option(help="classification or causal; by default what the fields of the data say.")
    ] = None,
    eval_data: Annotated[
        Path | None, typer.Option("--eval-data", metavar="FILE", help="Examples to evaluate on.")
    ] = None,
    eval_share: Annotated[float | None, typer.Option(help="The share of the data kept for evaluation. [0.1]")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data. [3]")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps, instead of epochs.")] = None,
    batch: Annotated[int | None, typer.Option(help="Examples in a batch of each variant. [16]")] = None,
    lr: Annotated[float | None, typer.Option("--lr", help="The peak learning rate, if not varied. [0.0005]")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Of AdamW. [0.01]")] = None,
    warmup: Annotated[float | None, typer.Option(help="The share of the steps in which the rate rises. [0.1]")] = None,
    length: Annotated[int | None, typer.Option(help="The most tokens of a text; longer ones are cut. [256]")] = None,
    seed: Annotated[int | None, typer.Option(help="Of all that is random. [0]")] = None,
    force: Annotated[bool, typer.Option("--force", help="Begin anew in a folder that this command made.")] = False,
    as_json: Json = False,
) -> None:
    """Train all combinations of options and learning rates in one run: an adapter of each, curves and scores.

    Every variant trains as it would alone, on the same batches; the base is in memory once. Examples are those of
    peftgraph train: peftgraph sweep DIR --data FILE --out OUT --vary rank=4,8,16 --vary lr=1e-4,1e-3.
    """
    from peftgraph.rewrite.recipe_check import check_recipe

    given: dict[str, Any] = {
        "model": source, "data": data, "out": out, "task": task, "eval_data": eval_data, "eval_share": eval_share,
        "epochs": epochs, "steps": steps, "batch": batch, "lr": lr, "seed": seed, "weight_decay": weight_decay,
        "warmup": warmup, "length": length,
    }  # fmt: skip
    check_recipe(recipe)
    varied = varied_values(vary or [])
    settings = read_settings(recipe, given)
    check_source(settings.model, weights=True)
    check_tools(settings.model)
    examples = read_examples(settings)
    check_folder(settings, resume=False, force=force)
    from peftgraph.experiments.run_sweep import run_sweep

    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        metrics = run_sweep(settings, examples, varied, caching(ctx))
    if as_json:
        emit({"out": str(settings.out), **metrics})
    else:
        show(settings.out, metrics)


def varied_values(options: list[str]) -> dict[str, list[Any]]:
    """Read options such as "rank=4,8".

    Raises:
        PeftGraphError: one is written in another way, or is given twice.
    """
    found: dict[str, list[Any]] = {}
    for one in options:
        name, _, values = one.partition("=")
        if not name.isidentifier() or not all(values.split(",")):
            raise PeftGraphError(f"--vary takes an option and its values, such as rank=4,8; got {one!r}.")
        if name in found:
            raise PeftGraphError(f"--vary {name} is given twice; write all values after one.")
        found[name] = [_value(text) for text in values.split(",")]
    return found


def _value(text: str) -> int | float | bool | str:
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def show(out: Path, metrics: dict[str, Any]) -> None:
    """Print a line for each variant."""
    for one in metrics["runs"]:
        score = one["score"]
        told = "" if score is None else f", {metrics['metric']} {score:.4g} on the evaluation part"
        best = "  (best)" if one["name"] == metrics["best"] else ""
        line = f"{one['name']}: loss {one['losses'][-1]:.4g}{told}; adapter {out / one['folder']}{best}"
        say(line)
    say(f"curves {out / 'curves.svg'}")
