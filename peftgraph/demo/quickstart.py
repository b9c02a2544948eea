"""Runs the quickstart step by step; each step is shown on the terminal and recorded in the metrics."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

import peftgraph as pg
from peftgraph.demo import terminal
from peftgraph.demo.artifacts import write_artifacts
from peftgraph.demo.baseline import fit_baseline, word_mask
from peftgraph.demo.dataset import build_dataset
from peftgraph.demo.encoder import NAME, encoder_folder
from peftgraph.demo.evaluation import evaluate_on_test
from peftgraph.demo.latency import measure_latency
from peftgraph.demo.proofreader import WIDEST, Proofreader, TokenisedPart, map_sentences
from peftgraph.demo.report import write_report
from peftgraph.demo.settings import Settings, Setup
from peftgraph.demo.slips import KINDS, Slip
from peftgraph.demo.splits import PARTS
from peftgraph.demo.training import train
from peftgraph.model_folders.loading import load
from peftgraph.terminal.console import working
from peftgraph.utils.atomic_files import atomic_file

MAPPED = (
    *("attention.q", "attention.k", "attention.v", "attention.o", "ffn.up", "ffn.gate", "ffn.hidden", "ffn.down"),
    "norm",
)  # the roles that the report's map of sites shows


def run(settings: Settings) -> dict[str, Any]:
    """Run the quickstart, write its folder, and return the metrics."""
    start = time.perf_counter()
    torch.manual_seed(settings.seed)
    setup = prepare(settings)
    base, tuned = adapt(setup)
    # The baseline: a linear head on the states of the frozen encoder.
    with terminal.progress("frozen states", sum(len(part.ids) for part in setup.parts.values())) as tick:
        frozen = Proofreader(base.module().eval(), nn.Linear(1, 1))
        states = {
            name: map_sentences(part, lambda batch: frozen.states(**batch), tick) for name, part in setup.parts.items()
        }
    with working("fitting the frozen baseline to convergence"):
        baseline = fit_baseline(states, setup.parts)
    test = setup.parts["test"]
    frozen_scores = baseline.head(states["test"]).detach().squeeze(-1).masked_fill(~word_mask(test, WIDEST), -torch.inf)
    # The tuned proof-reader, with a new head.
    net = Proofreader(tuned.module(), nn.Linear(setup.model.config.hidden_size, 1, bias=False))
    with terminal.training(settings.schedule.steps, baseline.validation) as live:
        curve = train(net, setup.parts, settings.schedule, settings.seed, live)
    with terminal.progress("testing the tuned proof-reader", len(test.ids)) as tick:
        scores = map_sentences(test, lambda batch: net(**batch), tick)
    evaluate_on_test(setup, baseline, frozen_scores, scores, curve)
    # Folded, timed, written to disk, and run again from there.
    merged = fold(setup, tuned)
    setup.metrics["latency"] = measure_latency(
        {"base": base, "adapted": tuned, "merged": merged}, setup.parts["test"], settings.rounds
    )
    terminal.latency(setup.metrics["latency"], setup.metrics["threads"])
    write_artifacts(setup, tuned, merged, net.head, scores)
    setup.metrics["seconds"] = round(time.perf_counter() - start, 1)
    finish(setup)
    return setup.metrics


def prepare(settings: Settings) -> Setup:
    """Load the encoder, build the data set and tokenise it."""
    folder = encoder_folder()
    model = load(folder)
    with working("reading the documentation of the standard library"):
        dataset = build_dataset(settings.seed, settings.limits)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    parts = {part: tokenise(tokenizer, [exercise.slip for exercise in dataset.parts[part]]) for part in PARTS}
    metrics: dict[str, Any] = {
        "model": NAME,
        "seed": settings.seed,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "data": {
            "sentences": {part: len(dataset.parts[part]) for part in PARTS},
            "modules": {part: len({e.sentence.module for e in dataset.parts[part]}) for part in PARTS},
            "per_kind": {
                kind: {part: sum(e.slip.kind == kind for e in dataset.parts[part]) for part in PARTS} for kind in KINDS
            },
            "dropped": dict(dataset.dropped),
        },
        "schedule": asdict(settings.schedule),
    }
    terminal.dataset(metrics["data"])
    return Setup(settings, model, dataset, parts, metrics)


def tokenise(tokenizer: Any, slips: Sequence[Slip]) -> TokenisedPart:
    """Tokenise sentences word by word."""
    ids, first = [], []
    for slip in slips:
        found = tokenizer(list(slip.words), is_split_into_words=True)
        ids.append(found["input_ids"])
        words = found.word_ids()
        first.append([words.index(i) for i in range(len(slip.words))])
    return TokenisedPart(ids, first, torch.tensor([slip.place for slip in slips]))


def adapt(setup: Setup) -> tuple[pg.Program, pg.Program]:
    """Trace the encoder and apply the recipe; return both programs."""
    with working("tracing") as progress:
        base = pg.trace(setup.model, setup.parts["train"].inputs([0, 1, 2]), progress=progress)
    tuned = base.apply(pg.load_recipe(setup.settings.recipe))
    terminal.program(base, tuned)
    count = tuned.count()
    words = {site.id: tuple(dict.fromkeys(_passes_at(tuned, site.id))) for site in base.sites}
    setup.metrics["recipe"] = str(tuned.recipe).splitlines()
    setup.metrics["count"] = {
        "trainable": count.trainable, "added": count.added, "changed": count.changed, "total": count.total,
        "ranks": str(count).rpartition("changes: ")[2],
    }  # fmt: skip
    setup.metrics["map"] = [
        {
            "block": f"layer {layer}",
            "sites": [[s.role, list(words[s.id])] for s in base.sites if s.layer == layer and s.role in MAPPED],
        }
        for layer in range(base.sites.layers)
    ]
    return base, tuned


def _passes_at(tuned: pg.Program, site: str) -> list[str]:
    return [tuned.history[edit.application].method.word for edit in tuned.edits if edit.site == site]


def fold(setup: Setup, tuned: pg.Program) -> pg.Program:
    """Fold the tuned program, with its proof."""
    with working("folding, with proof"):
        merged = pg.fold(tuned)
    assert merged.proof is not None
    setup.metrics["proof"] = str(merged.proof).splitlines()
    terminal.proof(setup.metrics["proof"])
    return merged


def finish(setup: Setup) -> None:
    """Write metrics.json and report.html."""
    out = setup.settings.out
    with atomic_file(out / "metrics.json") as path:
        path.write_text(json.dumps(setup.metrics, indent=1), encoding="utf-8")
    write_report(setup.metrics, out / "report.html")
    terminal.closing(out, setup.metrics["seconds"])
