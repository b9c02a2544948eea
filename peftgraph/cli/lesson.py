"""The quickstart, step by step: each function does one thing, shows it, and writes it down in `metrics`."""

from __future__ import annotations

import copy
import json
import statistics
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import peftgraph as pg
from peftgraph.cli import show
from peftgraph.cli.console import working
from peftgraph.cli.corpus import PARTS, Corpus, build_corpus
from peftgraph.cli.demo_model import NAME, demo_folder
from peftgraph.cli.files import atomic_folder, copy_companions
from peftgraph.cli.learning import Classifier, Curve, Encoded, Schedule, accuracy, frozen_baseline, per_sentence, train
from peftgraph.cli.models import load
from peftgraph.cli.report import write_report
from peftgraph.cli.rerun import rerun_onnx, rerun_pt2
from peftgraph.cli.timing import interleaved, ratio
from peftgraph.rewrite.recipe import to_toml
from peftgraph.utils.atomic_files import atomic

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RECIPE = "lora{at=attention.*|ffn.* rank=8 alpha=16 dropout=0.1}; ia3{}"
LONGEST = 64  # tokens
SHOWN = 12  # example predictions in the report


@dataclass(frozen=True)
class Settings:
    """What a run of the quickstart depends on; the same settings give the same numbers, times aside."""

    out: Path
    seed: int = 0
    recipe: str = RECIPE
    per_module: int = 40
    per_family: int = 500
    schedule: Schedule = field(default_factory=Schedule)
    rounds: tuple[int, int] = (60, 15)  # of timing, at the two batch sizes
    exports: tuple[str, ...] = (".pt2", ".onnx")


@dataclass(frozen=True)
class Material:
    """What every step works on."""

    settings: Settings
    model: PreTrainedModel
    corpus: Corpus
    parts: dict[str, Encoded]
    metrics: dict[str, Any]


def run(settings: Settings) -> dict[str, Any]:
    """Runs the quickstart, writes its folder, and returns the metrics."""
    start = time.perf_counter()
    torch.manual_seed(settings.seed)
    material = prepare(settings)
    base, tuned = adapt(material)
    labels = {part: material.parts[part].labels_N for part in PARTS}
    with show.progress("frozen embeddings", sum(len(part.ids) for part in material.parts.values())) as tick:
        frozen = Classifier(base.module().eval(), nn.Linear(1, 1))
        embeddings = {
            name: per_sentence(part, lambda batch: frozen.embed(**batch), tick) for name, part in material.parts.items()
        }
    with working("fitting the frozen baseline to convergence"):
        baseline = frozen_baseline(embeddings, labels, len(material.corpus.families))
    frozen_scores = baseline.head(embeddings["test"]).detach()

    net = Classifier(tuned.module(), copy.deepcopy(baseline.head), settings.schedule.dropout)
    with show.training(settings.schedule.steps, baseline.validation) as live:
        curve = train(net, material.parts, settings.schedule, settings.seed, live)
    with show.progress("testing the tuned classifier", len(material.parts["test"].ids)) as tick:
        scores = per_sentence(material.parts["test"], lambda batch: net(**batch), tick)
    judge(material, baseline.decay, baseline.validation, frozen_scores, scores, curve)

    merged = fold(material, tuned)
    measure(material, base, tuned, merged)
    write(material, tuned, merged, net.head, scores)
    material.metrics["seconds"] = round(time.perf_counter() - start, 1)
    finish(material)
    return material.metrics


def prepare(settings: Settings) -> Material:
    """The encoder, the corpus, and its token ids."""
    folder = demo_folder()
    model = load(folder)
    with working("reading the documentation of the standard library"):
        corpus = build_corpus(settings.seed, settings.per_module, settings.per_family)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    parts = {
        part: Encoded(
            tokenizer(corpus.texts(part), truncation=True, max_length=LONGEST)["input_ids"],
            torch.tensor(corpus.labels(part)),
        )
        for part in PARTS
    }
    sizes = {part: len(corpus.parts[part]) for part in PARTS}
    modules = {part: len({s.module for s in corpus.parts[part]}) for part in PARTS}
    metrics: dict[str, Any] = {
        "model": NAME,
        "seed": settings.seed,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "data": {
            "families": list(corpus.families),
            "sentences": sizes,
            "modules": modules,
            "per_family": {part: dict(Counter(s.family for s in corpus.parts[part])) for part in PARTS},
            "dropped": dict(corpus.dropped),
        },
        "schedule": asdict(settings.schedule),
    }
    show.corpus(metrics["data"])
    return Material(settings, model, corpus, parts, metrics)


def adapt(material: Material) -> tuple[pg.Program, pg.Program]:
    """The traced encoder, and the same with the recipe applied."""
    with working("tracing"):
        base = pg.trace(material.model, material.parts["train"].batch([0, 1, 2]))
    tuned = base.apply(pg.load_recipe(material.settings.recipe))
    show.program(base, tuned)
    count = tuned.count()
    words = {site.id: tuple(dict.fromkeys(_words_at(tuned, site.id))) for site in base.sites}
    material.metrics["recipe"] = str(tuned.recipe).splitlines()
    material.metrics["count"] = {
        "trainable": count.trainable, "added": count.added, "changed": count.changed, "total": count.total,
        "ranks": str(count).rpartition("changes: ")[2],
    }  # fmt: skip
    material.metrics["map"] = [
        {
            "block": f"layer {layer}",
            "sites": [[s.role, list(words[s.id])] for s in base.sites if s.layer == layer and s.role in MAPPED],
        }
        for layer in range(base.sites.layers)
    ]
    return base, tuned


MAPPED = (
    "attention.q",
    "attention.k",
    "attention.v",
    "attention.o",
    "ffn.up",
    "ffn.gate",
    "ffn.hidden",
    "ffn.down",
    "norm",
)


def _words_at(tuned: pg.Program, site: str) -> list[str]:
    return [tuned.history[edit.application].method.word for edit in tuned.edits if edit.site == site]


def judge(
    material: Material,
    decay: float,
    frozen_validation: float,
    frozen_NC: Tensor,
    tuned_NC: Tensor,
    curve: Curve,
) -> None:
    """The accuracies on the test part, looked at once: majority class, frozen head, tuned classifier."""
    labels_N = material.parts["test"].labels_N
    families = material.corpus.families
    majority = int(material.parts["train"].labels_N.bincount(minlength=len(families)).argmax())
    frozen_hits, tuned_hits = frozen_NC.argmax(-1) == labels_N, tuned_NC.argmax(-1) == labels_N
    matrix = torch.zeros(len(families), len(families), dtype=torch.long)
    matrix.index_put_((labels_N, tuned_NC.argmax(-1)), torch.ones_like(labels_N), accumulate=True)
    material.metrics["accuracy"] = {
        "majority": float((labels_N == majority).float().mean()),
        "frozen": accuracy(frozen_NC, labels_N),
        "tuned": accuracy(tuned_NC, labels_N),
        "tests": len(labels_N),
        "only_tuned_right": int((tuned_hits & ~frozen_hits).sum()),
        "only_frozen_right": int((frozen_hits & ~tuned_hits).sum()),
        "frozen_validation": frozen_validation,
        "frozen_decay": decay,
        "tuned_validation": curve.validations[-1][1],
        "per_family": [
            [name, _share(frozen_hits, labels_N == i), _share(tuned_hits, labels_N == i)]
            for i, name in enumerate(families)
        ],
        "confusion": matrix.tolist(),
    }
    material.metrics["curve"] = asdict(curve)
    material.metrics["examples"] = _examples(material, frozen_NC, tuned_NC)
    show.accuracies(material.metrics["accuracy"])


def _share(hits_N: Tensor, rows_N: Tensor) -> float:
    return float(hits_N[rows_N].float().mean()) if bool(rows_N.any()) else 0.0


def _examples(material: Material, frozen_NC: Tensor, tuned_NC: Tensor) -> list[dict[str, Any]]:
    """The first sentences of the shuffled test part: not chosen, so as honest as the accuracy."""
    families = material.corpus.families
    chances_NC = tuned_NC.softmax(-1)
    return [
        {
            "text": sentence.text,
            "module": sentence.module,
            "family": sentence.family,
            "frozen": families[int(frozen_NC[i].argmax())],
            "tuned": families[int(tuned_NC[i].argmax())],
            "chance": float(chances_NC[i].max()),
        }
        for i, sentence in enumerate(material.corpus.parts["test"][:SHOWN])
    ]


def fold(material: Material, tuned: pg.Program) -> pg.Program:
    """The merged program, with its proof."""
    with working("folding, with proof"):
        merged = pg.fold(tuned)
    assert merged.proof is not None
    material.metrics["proof"] = str(merged.proof).splitlines()
    show.proof(material.metrics["proof"])
    return merged


def measure(material: Material, base: pg.Program, tuned: pg.Program, merged: pg.Program) -> None:
    """Latency of the three programs as ratios, at batch 1 and 32."""
    programs = {"base": base, "adapted": tuned, "merged": merged}
    # Copies: two variants that share weights would warm the caches for each other.
    nets = {name: copy.deepcopy(program.module()).eval() for name, program in programs.items()}
    test = material.parts["test"]
    by_length = sorted(range(len(test.ids)), key=lambda row: len(test.ids[row]))
    found: list[dict[str, Any]] = []
    for size, rounds in zip((1, 32), material.settings.rounds, strict=True):
        batch = test.batch(by_length[len(by_length) // 2 :][:size] or by_length)
        with working(f"timing at batch {size}"):
            seconds = interleaved({name: _call(net, batch) for name, net in nets.items()}, rounds)
        found.append(
            {
                "batch": size,
                "tokens": batch["input_ids"].shape[1],
                "rounds": rounds,
                "milliseconds": {name: 1000 * statistics.median(values) for name, values in seconds.items()},
                "ratio": {name: ratio(values, seconds["base"]) for name, values in seconds.items()},
            }
        )
    material.metrics["latency"] = found
    show.latency(found, material.metrics["threads"])


def _call(net: nn.Module, batch: dict[str, Tensor]) -> Any:
    return lambda: net(**batch)


def write(material: Material, tuned: pg.Program, merged: pg.Program, head: nn.Linear, scores_NC: Tensor) -> None:
    """The adapter, the merged model, the head and the exported files; the files are run again on their own."""
    from safetensors.torch import save_file
    from transformers import AutoModel

    out = material.settings.out
    out.mkdir(parents=True, exist_ok=True)
    with atomic(out / "recipe.toml") as path:
        path.write_text(to_toml(tuned.recipe), encoding="utf-8")
    tuned.save_adapter(out / "adapter")
    merged.write_back(material.model)
    with working("writing the merged model"), atomic_folder(out / "merged", force=True) as folder:
        material.model.save_pretrained(str(folder))
        copy_companions(demo_folder(), folder)
    with atomic(out / "head.safetensors") as path:
        save_file({"weight": head.weight.detach().contiguous(), "bias": head.bias.detach().contiguous()}, path)
    reloaded = Classifier(AutoModel.from_pretrained(str(out / "merged"), local_files_only=True).eval(), head)
    with show.progress("testing the merged model, read back from disk", len(material.parts["test"].ids)) as tick:
        again_NC = per_sentence(material.parts["test"], lambda batch: reloaded(**batch), tick)
    exports: dict[str, Any] = {
        "merged model": {
            "same_predictions": float((again_NC.argmax(-1) == scores_NC.argmax(-1)).float().mean()),
            "accuracy": accuracy(again_NC, material.parts["test"].labels_N),
        }
    }
    cases = _cases(material, tuned)
    for suffix in material.settings.exports:
        file = out / f"merged{suffix}"
        with working(f"exporting and re-running {file.name}"):
            merged.export(file)
            found = rerun_pt2(file, cases) if suffix == ".pt2" else rerun_onnx(file, cases)
        exports[file.name] = {
            "bytes": file.stat().st_size,
            **(found or {"note": "not run: onnxruntime is not installed"}),
        }
    material.metrics["exports"] = exports
    show.exports(exports)


def _cases(material: Material, tuned: pg.Program) -> dict[str, dict[str, Tensor]]:
    """Test sentences with what the adapted (not the merged) encoder makes of them: one alone, and a padded batch."""
    net = tuned.module().eval()
    test = material.parts["test"]
    cases: dict[str, dict[str, Tensor]] = {}
    for name, rows in (("alone", [0]), ("batch", list(range(1, min(17, len(test.ids)))))):
        batch = test.batch(rows)
        with torch.no_grad():
            cases[name] = {**batch, "expected": net(**batch).last_hidden_state}
    return cases


def finish(material: Material) -> None:
    """metrics.json and report.html."""
    out = material.settings.out
    with atomic(out / "metrics.json") as path:
        path.write_text(json.dumps(material.metrics, indent=1), encoding="utf-8")
    write_report(material.metrics, out / "report.html")
    show.closing(out, material.metrics["seconds"])
