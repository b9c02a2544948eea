"""`peftgraph compare`: the table of a configuration, JSON, a page, and mistakes told at once."""

from __future__ import annotations

import json
from pathlib import Path

import transformers


def config(folder: Path) -> Path:
    made = transformers.GPT2Config(n_embd=32, n_head=4, n_layer=2, vocab_size=50, n_positions=64)
    made.architectures = ["GPT2LMHeadModel"]
    made.save_pretrained(str(folder))
    return folder


def test_recipes_are_compared_from_a_configuration(cli, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text('[[pass]]\nuse = "lora"\nrank = 3\n')
    command = ("compare", config(tmp_path / "model"), "--recipes", recipe, "ia3", "--batch", "2", "--length", "16")
    table = cli(*command)
    assert table.exit_code == 0, table.stderr
    lines = table.stdout.splitlines()
    assert lines[:2] == ["GPT2LMHeadModel: what methods cost", "2 rows of 16 tokens; computed without values"]
    assert [line.split()[0] for line in lines[3:]] == ["recipe", str(recipe), "ia3"]
    page = tmp_path / "page.html"
    found = cli(*command, "--json", "--html", page)
    rows = json.loads(found.stdout)["recipes"]
    assert [row["trainable"] for row in rows] == [2 * 2 * 3 * 64, 2 * (32 + 32 + 128)]
    assert "<svg" in page.read_text()


def test_mistakes_are_told(cli, tmp_path: Path) -> None:
    folder = config(tmp_path / "model")
    wrong = cli("compare", folder, "--recipes", "lorra")
    assert wrong.exit_code == 1
    assert "Did you mean 'lora'?" in wrong.stderr
    assert "at least one recipe" in cli("compare", folder).stderr
