"""`peftgraph train`: three tasks on tiny models, labels and heads, resuming, the table [train], and the files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from small_folders import WORDS, lines, reviews, saved
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)
from typer.testing import CliRunner, Result

import peftgraph as pg
from peftgraph.cli.app import app
from peftgraph.experiments.examples import read_examples
from peftgraph.experiments.run import make_task, train_head
from peftgraph.experiments.settings import read_settings

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


def train(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["train", *map(str, arguments)], env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(zoo.build("bert"), tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def classified(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a classifier that was trained from a whole experiment in one file."""
    folder = tmp_path_factory.mktemp("classified")
    reviews(folder / "reviews.jsonl")
    (folder / "experiment.toml").write_text(
        f'[train]\nmodel = "{bert}"\ndata = "reviews.jsonl"\nout = "out"\nsteps = 24\nbatch = 4\n'
        'lr = 0.02\nchecks = 3\neval_share = 0.25\n[[pass]]\nuse = "lora"\nrank = 2\n'
    )
    told = train("--recipe", folder / "experiment.toml")
    assert told.exit_code == 0, told.output
    assert "accuracy" in told.stdout
    return folder


def test_the_merged_model_knows_the_labels_and_loads_anywhere(classified: Path) -> None:
    merged = AutoModelForSequenceClassification.from_pretrained(classified / "out" / "merged").eval()
    assert merged.config.id2label == {0: "is bad", 1: "is good"}
    tokenizer = AutoTokenizer.from_pretrained(classified / "out" / "merged")
    rows = read_examples(read_settings(str(classified / "experiment.toml"), {})).evaluation
    with torch.no_grad():
        scores = merged(**tokenizer([row.texts["text"] for row in rows], return_tensors="pt")).logits
    hits = [merged.config.id2label[int(i)] == row.label for i, row in zip(scores.argmax(-1), rows, strict=True)]
    metrics = json.loads((classified / "out" / "metrics.json").read_text())
    assert sum(hits) / len(hits) == pytest.approx(metrics["checks"][-1][1])


def test_the_adapter_holds_the_head_and_the_labels(classified: Path, bert: Path) -> None:
    adapter = classified / "out" / "adapter"
    config = AutoConfig.from_pretrained(adapter)
    assert config.id2label == {0: "is bad", 1: "is good"}
    torch.manual_seed(5)  # another head at random: the adapter's is read
    model = AutoModelForSequenceClassification.from_pretrained(bert, config=config).eval()
    example = {"input_ids": torch.randint(2, 12, (3, 5)), "attention_mask": torch.ones(3, 5, dtype=torch.long)}
    tuned = pg.trace(model, example).load_adapter(adapter)
    assert {"classifier.weight", "classifier.bias"} <= set(tuned.table.trainable)
    merged = AutoModelForSequenceClassification.from_pretrained(classified / "out" / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(tuned.module().eval()(**example).logits, merged(**example).logits)


def test_metrics_report_and_curves(classified: Path) -> None:
    out = classified / "out"
    metrics = json.loads((out / "metrics.json").read_text())
    assert [step for step, _ in metrics["checks"]] == [0, 8, 16, 24]
    assert [step for step, _ in metrics["losses"]] == list(range(1, 25))
    assert metrics["losses"][-1][1] < metrics["losses"][0][1]
    assert metrics["rows"] == {"train": 18, "evaluation": 6}
    assert sum(count for _, count, _ in metrics["labels"]) == 6
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 2
    assert "$" not in page
    assert "is good" in page
    assert 'xmlns="http://www.w3.org/2000/svg"' in (out / "loss.svg").read_text()


def test_a_folder_is_begun_anew_only_by_force(classified: Path, bert: Path) -> None:
    arguments: list[object] = [bert, "--data", classified / "reviews.jsonl", "-r", "ia3", "--out", classified / "out"]
    told = train(*arguments)
    assert told.exit_code == 1
    assert "--resume continues it, --force begins anew" in told.stderr
    assert "cannot be resumed: eval_share was 0.25 and is 0.1" in train(*arguments, "--resume").stderr
    assert "holds no experiment to resume" in train(*arguments[:-1], classified / "none", "--resume").stderr


def test_a_resumed_run_ends_at_the_same_values(tmp_path: Path) -> None:
    model = saved(zoo.build("llama"), tmp_path / "llama")
    data = lines(
        tmp_path / "d.jsonl", [{"prompt": f"the {one} was", "completion": "very good"} for one in ("film", "book") * 6]
    )
    arguments = [model, "--data", data, "-r", "lora", "--steps", 4, "--batch", 2, "--checks", 2, "--no-merge"]
    whole, half = tmp_path / "whole", tmp_path / "half"
    told = train(*arguments, "--out", whole)
    assert told.exit_code == 0, told.output
    assert "merged model not asked for" in told.stdout
    half.mkdir()
    for name in ("experiment.json", ".peftgraph.json"):
        shutil.copy(whole / name, half / name)
    shutil.copytree(whole / "checkpoints" / "checkpoint-2", half / "checkpoints" / "checkpoint-2")
    told = train(*arguments, "--out", half, "--resume")
    assert told.exit_code == 0, told.output
    one, two = (next((folder / "adapter").glob("*.safetensors")).read_bytes() for folder in (whole, half))
    assert one == two
    first, second = (json.loads((folder / "metrics.json").read_text()) for folder in (whole, half))
    assert first["losses"] == second["losses"]


def test_models_whose_tokens_see_later_ones_are_refused(tmp_path: Path) -> None:
    config = BertConfig(vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    bert = saved(BertForMaskedLM(config), tmp_path / "bert")
    data = lines(tmp_path / "d.jsonl", [{"text": "the film was good"}] * 4)
    told = train(bert, "--data", data, "--out", tmp_path / "out", "--eval-share", 0)
    assert told.exit_code == 1
    assert "see later ones, so it is no causal model" in told.stderr


def test_embeddings_of_pairs(bert: Path, tmp_path: Path) -> None:
    rows = [{"anchor": f"{a} {b}", "positive": f"{b} was {a}"} for a in ("a", "the", "very") for b in WORDS[2:6]]
    told = train(
        bert, "--data", lines(tmp_path / "p.jsonl", rows), "-r", "adalora{warmup=1 final=1}", "--out", tmp_path / "out",
        "--steps", 6, "--batch", 4, "--lr", 0.02, "--checks", 2, "--eval-share", 0.3,
    )  # fmt: skip
    assert told.exit_code == 0, told.output
    assert "recall at 1" in told.stdout
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert [step for step, _ in metrics["checks"]] == [0, 3, 6]
    AutoModel.from_pretrained(tmp_path / "out" / "merged")


def test_a_head_that_knows_the_labels_is_used(bert: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(bert, id2label={0: "x", 1: "is good", 2: "is bad"}, num_labels=3)
    folder = saved(AutoModelForSequenceClassification.from_config(config), tmp_path / "classifier")

    def task(label: Callable[[str], Any]) -> Any:
        given = {"model": folder, "data": reviews(tmp_path / "r.jsonl", label), "out": tmp_path / "out"}
        settings = read_settings("lora", given)
        made = make_task(settings, read_examples(settings))
        return made, made.load()

    made, loaded = task(lambda word: f"is {word}")
    assert loaded.new == ()
    assert made.indices == {"is good": 1, "is bad": 2}
    made, loaded = task(lambda word: 2 if word == "good" else 0)
    assert loaded.new == ()
    assert made.indices == {2: 2, 0: 0}
    made, loaded = task(lambda word: f"so {word}")
    assert set(loaded.new) == {"classifier.weight", "classifier.bias"}
    assert loaded.model.config.id2label == {0: "so bad", 1: "so good"}


def test_what_a_classifier_has_besides_its_head_trains_too(tmp_path: Path) -> None:
    config = RobertaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_labels=3
    )  # fmt: skip
    model = RobertaForSequenceClassification(config).eval()
    ids = torch.randint(3, 20, (3, 5))
    program = pg.trace(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    tuned = train_head(program.apply(pg.parse_pass("ia3{}")), ["classifier.dense.weight", "classifier.dense.bias"])
    trained = {name for name in tuned.table.trainable if name.startswith("classifier")}
    assert trained == {f"classifier.{part}.{kind}" for part in ("dense", "out_proj") for kind in ("weight", "bias")}
    again = train_head(program.apply(pg.parse_pass("train{at=head}")), [])
    assert len(again.history) == 1, "the recipe trains the head already"
    with pytest.raises(pg.PeftGraphError, match="roberta.nowhere has no values"):
        train_head(program.apply(pg.parse_pass("ia3{}")), ["roberta.nowhere.weight"])


def test_the_loss_leaves_the_prompt_out(tmp_path: Path) -> None:
    folder = saved(zoo.build("llama"), tmp_path / "llama")
    data = lines(
        tmp_path / "d.jsonl",
        [{"prompt": "the film was", "completion": "very good"}, {"prompt": "a", "completion": "book"}],
    )
    settings = read_settings("lora", {"model": folder, "data": data, "out": tmp_path, "eval_share": 0.0, "length": 8})
    task = make_task(settings, read_examples(settings))
    batch = task.example([task.encode(row) for row in sorted(read_examples(settings).train, key=lambda row: row.line)])
    assert batch["labels"].tolist() == [[-100, -100, -100, 9, 2, 1], [-100, 5, 1, -100, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1] * 6, [1, 1, 1, 0, 0, 0]]
    assert float(batch["num_items_in_batch"]) == 5
