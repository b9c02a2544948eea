"""Runs an experiment: loads, traces, applies the recipe, trains by transformers' Trainer, and writes the results."""

from __future__ import annotations

import json
import math
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PrinterCallback, Trainer, TrainingArguments, set_seed

import peftgraph as pg
from peftgraph.errors import PeftGraphError
from peftgraph.experiments.embedding_trainer import EmbeddingTrainer, pooling
from peftgraph.experiments.examples import Examples
from peftgraph.experiments.folder import CHECKPOINTS, begin, last_checkpoint
from peftgraph.experiments.progress import ProgressCallback
from peftgraph.experiments.report import write_report
from peftgraph.experiments.settings import Settings
from peftgraph.experiments.tasks import TASKS, Classification, Embedding, Encoded, Task
from peftgraph.model_folders.loading import first_line
from peftgraph.model_folders.output_folder import atomic_folder, copy_companions
from peftgraph.rewrite.recipe import load_recipe, to_toml
from peftgraph.terminal.console import OUT, hush, working
from peftgraph.terminal.tables import count_table
from peftgraph.training.transformers_callback import PassesCallback
from peftgraph.utils.atomic_files import atomic_file

LOGGED = 200  # losses of a training that are kept


def run(settings: Settings, examples: Examples, resume: bool = False, cache: bool = False) -> dict[str, Any]:
    """Run an experiment and return its metrics.

    Args:
        settings: of the experiment.
        examples: what `read_examples` found.
        resume: whether to continue from the last checkpoint in the folder.
        cache: whether the program of an earlier trace may be taken, and this one is kept.
    """
    start = time.perf_counter()
    hush()
    method = load_recipe(settings.recipe)
    set_seed(settings.seed)
    task = make_task(settings, examples)
    loaded = task.load()
    parts = {
        name: [task.encode(row) for row in rows]
        for name, rows in (("train", examples.train), ("evaluation", examples.evaluation))
    }
    with working("tracing") as progress:
        program = pg.trace(loaded.model, task.example(few(parts["train"])), progress=progress, cache=cache)
    with working("applying"):
        tuned = program.apply(method)
        tuned = train_head(tuned, loaded.new) if isinstance(task, Classification) else tuned
    OUT.print(count_table(tuned.count()))
    checkpoint = last_checkpoint(settings.out) if resume else None
    begin(settings, resume)
    trainer = make_trainer(task, tuned, parts, resumes=checkpoint is not None)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    metrics = {"settings": settings.as_json(), **measured(trainer, task, tuned, parts)}
    assert trainer.model is not None
    trainer.model.cpu()  # where the program's other tensors are
    metrics["merged"] = write_results(tuned, task, loaded.model)
    metrics["seconds"] = round(time.perf_counter() - start, 1)
    with atomic_file(settings.out / "metrics.json") as path:
        path.write_text(json.dumps(metrics, indent=1), encoding="utf-8")
    write_report(metrics, settings.out)
    return metrics


def measured(trainer: Trainer, task: Task, tuned: pg.Program, parts: Mapping[str, Sequence[Encoded]]) -> dict[str, Any]:
    """Return what a finished training is told by."""
    count = tuned.count()
    found = {
        "task": task.word,
        "metric": task.title,
        "rising": task.rising,
        "rows": {name: len(rows) for name, rows in parts.items()},
        "cut": task.cut,
        "recipe": str(tuned.recipe).splitlines(),
        "count": {"trainable": count.trainable, "added": count.added, "changed": count.changed, "total": count.total},
        **_history(trainer, task, bool(parts["evaluation"])),
    }
    return (
        found | {"labels": by_label(trainer, task, parts["evaluation"])} if isinstance(task, Classification) else found
    )


def make_task(settings: Settings, examples: Examples) -> Task:
    """Make the task of the examples, with the model's tokenizer.

    Raises:
        PeftGraphError: the folder has no tokenizer that can be read.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(settings.model), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a damaged file raises
        raise PeftGraphError(f"The tokenizer in {settings.model} cannot be read: {first_line(error)}") from error
    longest = min(settings.length, getattr(tokenizer, "model_max_length", settings.length))
    task = TASKS[examples.task](settings, tokenizer, longest)
    if isinstance(task, Classification):
        task.labels = examples.labels
    return task


def few(rows: Sequence[Encoded]) -> list[Encoded]:
    """Return three rows to trace with; of fewer, the first one more often."""
    return [*rows[:3], *[rows[0]] * (3 - len(rows[:3]))]


def train_head(tuned: pg.Program, new: Sequence[str]) -> pg.Program:
    """Train the head, and every parameter that the model's folder has no values of, unless the recipe does.

    Args:
        tuned: the program with the recipe.
        new: the names of the parameters without values.

    Raises:
        PeftGraphError: there is no head, or a new parameter is in no part that could train.
    """
    heads = [site for site in tuned.sites if site.role == "head"]
    if not heads:
        raise PeftGraphError("No head was found in this classifier, so nothing would learn the labels.")
    wanted = {name.rpartition(".")[0] for name in new} | {site.path for site in heads}
    trained = {name.rpartition(".")[0] for name in tuned.table.trainable}
    by_path = {site.path: site.role for site in reversed(list(tuned.sites)) if site.role != "bias"}
    for path in sorted(wanted - trained):
        if path not in by_path:
            raise PeftGraphError(f"{path} has no values in the model's folder, and no part of it can train.")
        where = "" if by_path[path] == "head" else f'.where(path="{re.escape(path)}")'
        tuned = tuned.apply(pg.parse_pass(f"train{{at={by_path[path]}{where}}}"))
    return tuned


def make_trainer(task: Task, tuned: pg.Program, parts: Mapping[str, Sequence[Encoded]], resumes: bool) -> Trainer:
    """Make the Trainer of an experiment.

    Args:
        task: of the experiment.
        tuned: the program that trains.
        parts: the rows of both parts.
        resumes: whether it continues from a checkpoint, where nothing is measured before the first step.
    """
    embeds, evaluates = isinstance(task, Embedding), bool(parts["evaluation"])
    passes = PassesCallback(tuned, add_penalty=not embeds)
    options: dict[str, Any] = {
        "model": tuned.module(),
        "args": _arguments(task, len(parts["train"]), evaluates, evaluates and not resumes),
        "train_dataset": parts["train"],
        "eval_dataset": parts["evaluation"] or None,
        "data_collator": task.collate,
        "callbacks": [passes, ProgressCallback(task.metric, task.title)],
    }
    if embeds:
        trainer: Trainer = EmbeddingTrainer(**options, pool=pooling(task.settings.model), passes=passes)
    else:
        trainer = Trainer(**options, compute_metrics=_accuracy if isinstance(task, Classification) else None)
    trainer.pop_callback(PrinterCallback)
    return trainer


def _arguments(task: Task, rows: int, evaluates: bool, first: bool) -> TrainingArguments:
    """Return the Trainer's arguments; `first` says whether to evaluate before the first step."""
    one = task.settings
    total = one.steps or math.ceil(math.ceil(math.ceil(rows / one.batch) / one.accumulate) * one.epochs)
    every = max(1, round(total / one.checks))
    return TrainingArguments(
        str(one.out / CHECKPOINTS), max_steps=total, per_device_train_batch_size=one.batch,
        per_device_eval_batch_size=one.batch, gradient_accumulation_steps=one.accumulate, learning_rate=one.lr,
        weight_decay=one.weight_decay, warmup_steps=round(one.warmup * total), lr_scheduler_type="linear",
        eval_strategy="steps" if evaluates else "no", eval_steps=every, save_strategy="steps", save_steps=every,
        save_total_limit=2, logging_steps=max(1, total // LOGGED), eval_on_start=first, remove_unused_columns=False,
        label_names=["labels"], report_to=[], seed=one.seed, disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        prediction_loss_only=not isinstance(task, Classification),
    )  # fmt: skip


def _accuracy(found: Any) -> dict[str, float]:
    return {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())}


def _history(trainer: Trainer, task: Task, evaluates: bool) -> dict[str, Any]:
    """Return the losses and the evaluations by step; the last step is evaluated if it was not."""
    if evaluates and not any(
        task.metric in entry and entry["step"] == trainer.state.global_step for entry in trainer.state.log_history
    ):
        trainer.evaluate()
    log = trainer.state.log_history
    losses = {entry["step"]: entry["loss"] for entry in log if "loss" in entry}
    checks = {entry["step"]: entry[task.metric] for entry in log if task.metric in entry}
    return {"losses": sorted(losses.items()), "checks": sorted(checks.items()), "steps": trainer.state.global_step}


def by_label(trainer: Trainer, task: Classification, rows: Sequence[Encoded]) -> list[list[Any]]:
    """Return for each label how many rows of the evaluation part have it, and how many of them are told right."""
    if not rows:
        return []
    found: Any = trainer.predict(rows)  # pyright: ignore[reportArgumentType]
    hits = found.predictions.argmax(-1) == found.label_ids
    return [
        [name, int((found.label_ids == i).sum()), int(hits[found.label_ids == i].sum())]
        for i, name in enumerate(task.names)
    ]


def write_results(tuned: pg.Program, task: Task, model: Any) -> str:
    """Write the recipe, the adapter with the model's configuration, and the merged model; say why it is not merged."""
    one = task.settings
    with atomic_file(one.out / "recipe.toml") as path:
        path.write_text(to_toml(tuned.recipe), encoding="utf-8")
    tuned.save_adapter(one.out / "adapter")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(str(one.out / "adapter"))
    if not one.merge:
        return "not asked for"
    try:
        with working("folding, with proof"):
            merged = pg.fold(tuned)
    except PeftGraphError as refusal:
        return f"does not fold: {first_line(refusal)}"
    merged.write_back(model)
    with working("writing the merged model"), atomic_folder(one.out / "merged", force=True) as folder:
        model.save_pretrained(str(folder))
        task.tokenizer.save_pretrained(str(folder))
        copy_companions(one.model, folder)
        _copy_modules(one.model, folder)
    return "folded, and written"


def _copy_modules(source: Path, target: Path) -> None:
    """Copy the folders of a model for sentence-transformers beside its encoder, such as 1_Pooling."""
    for folder in sorted(source.glob("[0-9]_*")):
        if folder.is_dir():
            shutil.copytree(folder, target / folder.name)
