"""`peftgraph train`: trains a recipe on a file of examples."""

from __future__ import annotations

import sys
from contextlib import nullcontext, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peftgraph.cli.caching import caching
from peftgraph.cli.options import Json
from peftgraph.errors import PeftGraphError
from peftgraph.model_folders.loading import check_source
from peftgraph.terminal.console import emit, say

if TYPE_CHECKING:
    from peftgraph.experiments.settings import Settings


def train(
    ctx: typer.Context,
    source: Annotated[Path | None, typer.Argument(metavar="[DIR]", help="A local transformers folder.")] = None,
    recipe: Annotated[
        str, typer.Option("--recipe", "-r", help="A TOML file, a spec such as 'lora{rank=8}', or a word such as ia3.")
    ] = "lora",
    data: Annotated[
        Path | None, typer.Option("--data", metavar="FILE", help="The examples, a JSON object on each line.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="The folder that is written.")] = None,
    task: Annotated[
        str | None,
        typer.Option(help="classification, causal or embedding; by default what the fields of the data say."),
    ] = None,
    eval_data: Annotated[
        Path | None, typer.Option("--eval-data", metavar="FILE", help="Examples to evaluate on.")
    ] = None,
    eval_share: Annotated[float | None, typer.Option(help="The share of the data kept for evaluation. [0.1]")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data. [3]")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps, instead of epochs.")] = None,
    batch: Annotated[int | None, typer.Option(help="Examples in a batch. [16]")] = None,
    accumulate: Annotated[int | None, typer.Option(help="Batches in a step. [1]")] = None,
    lr: Annotated[float | None, typer.Option("--lr", help="The peak learning rate. [0.0005]")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Of AdamW. [0.01]")] = None,
    warmup: Annotated[float | None, typer.Option(help="The share of the steps in which the rate rises. [0.1]")] = None,
    length: Annotated[int | None, typer.Option(help="The most tokens of a text; longer ones are cut. [256]")] = None,
    checks: Annotated[int | None, typer.Option(help="How often to evaluate and to write a checkpoint. [5]")] = None,
    seed: Annotated[int | None, typer.Option(help="Of all that is random. [0]")] = None,
    merge: Annotated[bool | None, typer.Option("--merge/--no-merge", help="Write the merged model. [merge]")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the last checkpoint in the folder.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Begin anew in a folder that this command made.")] = False,
    as_json: Json = False,
) -> None:
    """Train a recipe on examples, by transformers' Trainer: the adapter, the merged model, curves and a report.

    A row is {"text", "label"} for classification, {"prompt", "completion"} or {"text"} for causal language modelling,
    {"anchor", "positive"} for embeddings. A TOML recipe with a table [train], whose keys are these options, is a
    whole experiment: peftgraph train --recipe experiment.toml.
    """
    from peftgraph.experiments.examples import read_examples
    from peftgraph.experiments.folder import check_folder
    from peftgraph.experiments.settings import read_settings
    from peftgraph.rewrite.recipe_check import check_recipe

    given: dict[str, Any] = {
        "model": source, "data": data, "out": out, "task": task, "eval_data": eval_data, "eval_share": eval_share,
        "epochs": epochs, "steps": steps, "batch": batch, "accumulate": accumulate, "lr": lr, "seed": seed,
        "weight_decay": weight_decay, "warmup": warmup, "length": length, "checks": checks, "merge": merge,
    }  # fmt: skip
    check_recipe(recipe)
    settings = read_settings(recipe, given)
    check_source(settings.model, weights=True)
    check_tools(settings.model)
    examples = read_examples(settings)
    check_folder(settings, resume, force)
    from peftgraph.experiments.run import run

    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        metrics = run(settings, examples, resume, caching(ctx))
    if as_json:
        emit({"out": str(settings.out), **metrics})
    else:
        show(settings, metrics)


def check_tools(model: Path) -> None:
    """Refuse a folder without a tokenizer, and an environment without what the Trainer needs.

    Raises:
        PeftGraphError: one of them is missing.
    """
    if not any(model.glob("tokenizer*")) and not any(model.glob("*vocab*")) and not any(model.glob("*.model")):
        raise PeftGraphError(f"{model} contains no tokenizer (tokenizer.json), so its texts cannot be read.")
    if find_spec("accelerate") is None:
        raise PeftGraphError('The Trainer of transformers needs accelerate: pip install "peftgraph[train]".')


def show(settings: Settings, metrics: dict[str, Any]) -> None:
    """Print what came out."""
    from peftgraph.experiments.report import value_text

    out = settings.out
    if metrics["checks"]:
        (first, before), (_, after) = metrics["checks"][0], metrics["checks"][-1]
        earlier = f", {value_text(metrics, before)} before" if first == 0 else ""
        say(f"{metrics['metric']} {value_text(metrics, after)}{earlier}", "bold")
    say(f"adapter {out / 'adapter'}; report {out / 'report.html'}")
    where = f": {out / 'merged'}" if (out / "merged").is_dir() else ""
    say(f"merged model {metrics['merged']}{where}")
