"""Runs a sweep: variants of a recipe over options and learning rates, trained together on one file of examples."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from peftgraph.errors import PeftGraphError
from peftgraph.experiments.curves import curves
from peftgraph.experiments.examples import Examples
from peftgraph.experiments.folder import begin
from peftgraph.experiments.run import few, make_task, train_head
from peftgraph.experiments.settings import Settings
from peftgraph.experiments.sweep import Sweep, Variant, shuffled
from peftgraph.experiments.tasks import Classification, Encoded, Task
from peftgraph.rewrite.method import Pass, Pipeline
from peftgraph.rewrite.recipe import load_recipe
from peftgraph.terminal.console import hush, working
from peftgraph.utils.atomic_files import atomic_file

LR = "lr"
Values = Mapping[str, Sequence[Any]]


def variants_of(recipe: Pass, lr: float, varied: Values) -> dict[str, Variant]:
    """Return every combination of the values of options and learning rates, by a name such as "rank=8 lr=0.001".

    Args:
        recipe: the passes.
        lr: the learning rate where none is varied.
        varied: option, or "lr" -> its values.

    Raises:
        PeftGraphError: no pass has an option of that name, or fewer than two variants are left.
    """
    found: dict[str, Variant] = {}
    for values in itertools.product(*varied.values()):
        chosen = dict(zip(varied, values, strict=True))
        name = " ".join(f"{key}={value}" for key, value in chosen.items())
        rate = chosen.pop(LR, lr)
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < math.inf:
            raise PeftGraphError(f"lr must be a number above 0, got {rate!r}.")
        found[name] = Variant(_with_options(recipe, chosen), float(rate))
    if len(found) < 2:
        raise PeftGraphError("A sweep has at least two variants, such as --vary rank=4,8; for one: peftgraph train.")
    return found


def _with_options(recipe: Pass, options: Mapping[str, Any]) -> Pass:
    atoms = list(recipe.passes())
    for key, value in options.items():
        having = [i for i, one in enumerate(atoms) if key in {field.name for field in dataclasses.fields(one)}]
        if not having:
            known = sorted({field.name for one in atoms for field in dataclasses.fields(one)} - {"name"})
            raise PeftGraphError(f"No pass of the recipe has an option {key!r}; there are {', '.join(known)}, and lr.")
        for i in having:
            atoms[i] = dataclasses.replace(atoms[i], **{key: value})
    return atoms[0] if len(atoms) == 1 else Pipeline(atoms)


def run_sweep(settings: Settings, examples: Examples, varied: Values, cache: bool = False) -> dict[str, Any]:
    """Run a sweep and return what came out of each variant.

    Args:
        settings: of all; the learning rate is that of variants that have none of their own.
        examples: what `read_examples` found.
        varied: option, or "lr" -> its values.
        cache: whether the program of an earlier trace may be taken, and this one is kept.

    Raises:
        PeftGraphError: the task is embedding, or variants cannot be trained together.
    """
    import peftgraph as pg

    if examples.task == "embedding":
        raise PeftGraphError("A sweep trains classifiers and causal language models; for embeddings: peftgraph train.")
    start = time.perf_counter()
    hush()
    variants = variants_of(load_recipe(settings.recipe), settings.lr, varied)
    task = make_task(settings, examples)
    loaded = task.load()
    train, evaluation = ([task.encode(row) for row in rows] for rows in (examples.train, examples.evaluation))
    with working("tracing") as progress:
        program = pg.trace(loaded.model, task.example(few(train)), progress=progress, cache=cache)
    if isinstance(task, Classification):
        variants = _with_head(program, variants, loaded.new)
    names = {f"run{i}": name for i, name in enumerate(variants, 1)}
    with working("applying"):
        sweep = Sweep.of(program, {run: variants[name] for run, name in names.items()}, not _classifies(task))
    begin(settings, resume=False)
    steps = settings.steps or math.ceil(math.ceil(len(train) / settings.batch) * settings.epochs)
    batches = (task.collate(rows) for rows in shuffled(train, settings.batch, settings.seed))
    with working(f"training {len(variants)} variants"):
        sweep.train(batches, steps, settings.weight_decay, settings.warmup)
    scores = _scores(sweep, task, evaluation)
    metrics = _told(settings, task, sweep, names, scores) | {"seconds": round(time.perf_counter() - start, 1)}
    _write(settings, sweep, names, metrics, loaded.model)
    return metrics


def _classifies(task: Task) -> bool:
    return isinstance(task, Classification)


def _with_head(program: Any, variants: Mapping[str, Variant], new: Sequence[str]) -> dict[str, Variant]:
    """Let each variant train a head of its own, and what the model's folder has no values of."""
    found: dict[str, Variant] = {}
    for name, one in variants.items():
        tuned = program.apply(one.method)
        more = [applied.method for applied in train_head(tuned, new).history[len(tuned.history) :]]
        found[name] = dataclasses.replace(one, method=Pipeline([*one.method.passes(), *more]) if more else one.method)
    return found


def _scores(sweep: Sweep, task: Task, rows: Sequence[Encoded]) -> list[float]:
    if not rows:
        return []
    size = task.settings.batch
    return sweep.evaluate(task.collate(rows[i : i + size]) for i in range(0, len(rows), size))


def _told(
    settings: Settings, task: Task, sweep: Sweep, names: Mapping[str, str], scores: Sequence[float]
) -> dict[str, Any]:
    best = (max if task.rising else min)(range(len(scores)), key=scores.__getitem__) if scores else None
    runs = [
        {
            "name": name,
            "folder": run,
            "lr": sweep.variants[run].lr,
            "recipe": str(sweep.variants[run].method).splitlines(),
            "trainable": sweep.programs[run].count().trainable,
            "losses": [losses[i] for losses in sweep.losses],
            "score": scores[i] if scores else None,
        }
        for i, (run, name) in enumerate(names.items())
    ]
    told = {"settings": settings.as_json(), "task": task.word, "metric": task.title, "steps": len(sweep.losses)}
    return told | {"runs": runs, "best": None if best is None else list(names.values())[best]}


def _write(settings: Settings, sweep: Sweep, names: Mapping[str, str], metrics: Mapping[str, Any], model: Any) -> None:
    """Write each variant as an adapter of its own, the curves and the numbers."""
    model.config.architectures = [type(model).__name__]
    for run, tuned in sweep.programs.items():
        tuned.save_adapter(settings.out / run)
        model.config.save_pretrained(str(settings.out / run))
    series = {
        name: [(step + 1.0, losses[i]) for step, losses in enumerate(sweep.losses)]
        for i, name in enumerate(names.values())
    }
    with atomic_file(settings.out / "curves.svg") as path:
        path.write_text(curves(series, "loss of each variant over the steps"), encoding="utf-8")
    with atomic_file(settings.out / "sweep.json") as path:
        path.write_text(json.dumps(metrics, indent=1), encoding="utf-8")
