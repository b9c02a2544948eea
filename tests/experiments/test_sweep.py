"""Sweeps: variants that train together are what each is alone; the command writes an adapter of each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from small_folders import WORDS, lines, reviews, saved
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner, Result

import peftgraph as pg
from peftgraph.cli.app import app
from peftgraph.cli.cmd_sweep import varied_values
from peftgraph.experiments.examples import read_examples
from peftgraph.experiments.run_sweep import variants_of
from peftgraph.experiments.settings import Settings
from peftgraph.experiments.sweep import Sweep, Variant, rate
from peftgraph.passes import IA3, AdaLoRA, LoRA

F64 = torch.float64


def sweep(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["sweep", *map(str, arguments)], env={"COLUMNS": "200"})


def by_name(metrics: dict[str, Any]) -> dict[str, Any]:
    return {one["name"]: one for one in metrics["runs"]}


def batches(count: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    found: list[dict[str, torch.Tensor]] = []
    for length in range(5, 5 + count):
        ids = torch.randint(3, zoo.VOCAB, (2, length), generator=generator)
        labels = ids.clone()
        labels[0, :2] = -100  # rows with other numbers of labels
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return found


def test_together_is_as_alone() -> None:
    """Eight ranks and learning rates, and another method beside them, after five steps of AdamW."""
    program = zoo.traced("llama", dtype=F64)
    variants = {f"lora{rank}": Variant(LoRA(rank=rank, alpha=2.0 * rank), 0.002 * rank) for rank in range(1, 9)}
    variants["scales"] = Variant(IA3(), 0.05)
    together = Sweep.of(program, variants, causal=True, seed=4)
    quiet(together.net)
    together.train(batches(5), 5, weight_decay=0.1, warmup=0.3)
    for i, (name, one) in enumerate(variants.items()):
        torch.manual_seed(4)
        alone = program.apply(one.method)
        net: Any = quiet(alone.module())
        trained = list(alone.table.trainable.values())
        optimiser = torch.optim.AdamW(trained, lr=one.lr, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: rate(step, 5, 0.3))
        for step, batch in enumerate(batches(5)):
            logits = net(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            loss = cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            schedule.step()
            assert abs(loss.item() - together.losses[step][i]) < 1e-9
        found = together.programs[name].table.trainable
        assert found.keys() == alone.table.trainable.keys()
        for key, value in alone.table.trainable.items():
            assert (found[key] - value).abs().max() < 1e-8


def quiet(net: Any) -> Any:
    """A module in the mode in which no dropout runs, also where a loop calls train()."""
    net.eval()
    net.train = lambda mode=True: net
    return net


def test_what_is_refused() -> None:
    program = zoo.traced("llama", dtype=F64)
    with pytest.raises(pg.PeftGraphError, match="takes part in its training"):
        Sweep.of(program, {"a": Variant(AdaLoRA(rank=4, target_rank=2), 0.1), "b": Variant(LoRA(), 0.1)}, causal=True)
    one = Sweep.of(program, {"a": Variant(LoRA(rank=2), 0.1)}, causal=True)
    with pytest.raises(pg.PeftGraphError, match="There are 2 batches for 3 steps"):
        one.train(batches(2), 3)
    with pytest.raises(pg.PeftGraphError, match="No pass of the recipe has an option 'rang'"):
        variants_of(LoRA(), 0.1, {"rang": [1, 2]})
    with pytest.raises(pg.PeftGraphError, match="at least two variants"):
        variants_of(LoRA(), 0.1, {"rank": [4]})
    with pytest.raises(pg.PeftGraphError, match="lr must be a number above 0"):
        variants_of(LoRA(), 0.1, {"lr": [0.1, "x"]})
    for text in ("rank", "rank=1,,2", "=3"):
        with pytest.raises(pg.PeftGraphError, match="takes an option and its values"):
            varied_values([text])
    with pytest.raises(pg.PeftGraphError, match="given twice"):
        varied_values(["rank=1", "rank=2"])


def test_combinations() -> None:
    found = variants_of(LoRA(), 0.5, varied_values(["rank=2,4", "lr=1e-3,0.1"]))
    assert list(found) == ["rank=2 lr=0.001", "rank=2 lr=0.1", "rank=4 lr=0.001", "rank=4 lr=0.1"]
    assert found["rank=4 lr=0.1"] == Variant(LoRA(rank=4), 0.1)
    assert variants_of(LoRA(), 0.5, {"rank": [2, 4]})["rank=4"].lr == 0.5


def test_classifiers_with_heads_of_their_own(tmp_path: Path) -> None:
    bert = saved(zoo.build("bert"), tmp_path / "bert")
    data, out = reviews(tmp_path / "reviews.jsonl"), tmp_path / "out"
    told = sweep(
        bert, "--data", data, "--out", out, "--recipe", "lora", "--vary", "rank=1,2", "--vary", "lr=1e-5,0.02",
        "--steps", 20, "--batch", 4, "--eval-share", 0.25, "--seed", 0,
    )  # fmt: skip
    assert told.exit_code == 0, told.output
    assert "(best)" in told.stdout
    metrics = json.loads((out / "sweep.json").read_text())
    assert [len(one["losses"]) for one in metrics["runs"]] == [20] * 4
    assert max(one["score"] for one in metrics["runs"]) == by_name(metrics)[metrics["best"]]["score"]
    assert (out / "curves.svg").read_text().count('<path class="one"') == 4
    rows = read_examples(Settings(model=bert, data=data, recipe="lora", out=out, eval_share=0.25)).evaluation
    words = [row.texts["text"].split() for row in rows]
    ids = torch.tensor([[WORDS.index(word) for word in one] for one in words])
    example = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    config = AutoConfig.from_pretrained(out / "run4")
    program = pg.trace(AutoModelForSequenceClassification.from_pretrained(bert, config=config).eval(), example)
    heads: list[torch.Tensor] = []
    for one in metrics["runs"]:
        tuned = program.load_adapter(out / one["folder"])
        heads.append(tuned.table["classifier.weight"].tensor)
        found = tuned.module().eval()(**example).logits.argmax(-1)
        hits = [config.id2label[int(i)] == row.label for i, row in zip(found, rows, strict=True)]
        assert sum(hits) / len(hits) == pytest.approx(one["score"])
    assert not torch.equal(heads[1], heads[3])
    again = sweep(bert, "--data", data, "--out", out, "--vary", "rank=1,2")
    assert again.exit_code == 1
    assert "--force begins anew" in again.stderr


def test_language_models(tmp_path: Path) -> None:
    sizes = {**zoo.SIZES, "vocab_size": len(WORDS), "pad_token_id": 0, "eos_token_id": 1}
    torch.manual_seed(0)
    llama = saved(LlamaForCausalLM(LlamaConfig(**sizes)), tmp_path / "llama")
    rows = [{"prompt": f"the {what} was", "completion": "very dull"} for what in ("film", "book")] * 4
    data = lines(tmp_path / "rows.jsonl", rows)
    told = sweep(
        llama, "--data", data, "--out", tmp_path / "out", "--vary", "lr=0.001,0.05", "--steps", 6, "--batch", 2
    )
    assert told.exit_code == 0, told.output
    metrics = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert metrics["best"] == "lr=0.05"
    assert by_name(metrics)["lr=0.05"]["score"] < by_name(metrics)["lr=0.05"]["losses"][0] - 0.05
    told = sweep(llama, "--data", lines(tmp_path / "p.jsonl", [{"anchor": "a", "positive": "the"}] * 9), "--out", "o")
    assert told.exit_code == 1
    assert "classifiers and causal language models" in told.stderr
