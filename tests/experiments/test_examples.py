"""Files of examples and settings: what is wrong is told with its line, before torch is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from peftgraph.errors import PeftGraphError
from peftgraph.experiments.curves import curve, moving_mean
from peftgraph.experiments.examples import Examples, read_examples
from peftgraph.experiments.settings import read_settings

PAIR = '{"anchor": "a b", "positive": "c d"}'
LABELLED = '{"text": "a b", "label": "x"}\n{"text": "c", "label": "y"}\n'


def read(folder: Path, text: str, **given: Any) -> Examples:
    (folder / "d.jsonl").write_text(text)
    return read_examples(
        read_settings("lora", {"model": folder, "data": folder / "d.jsonl", "out": folder / "o", **given})
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (PAIR + "\n\n{", "line 3 is no JSON"),
        (PAIR + '\n["anchor"]', "line 2 is no JSON object"),
        (PAIR + '\n{"anchor": "a"}', "line 2: a row of embedding has 'anchor', 'positive'; this one has 'anchor'"),
        (PAIR + '\n{"anchor": "a", "positive": " "}', "line 2: 'positive' must be text that is not empty"),
        (PAIR + '\n{"anchor": 3, "positive": "b"}', "line 2: 'anchor' must be text that is not empty, got 3"),
        ('{"anchor": "a", "anchor": "b"}', "line 1 is no JSON: the key 'anchor' occurs twice"),
        ('{"words": "a"}', "the fields of its first row, 'words', fit no task"),
        (" \n", "has no rows"),
        (LABELLED + '{"text": "d", "label": 1}', "not both: line 1 has 'x', line 3 has 1"),
        ('{"text": "d", "label": 1.5}', "line 1: a label is text or a whole number, got 1.5"),
        ('{"text": "d", "label": true}', "line 1: a label is text or a whole number, got True"),
        ('{"text": "d", "label": "x"}\n' * 20, "every row has the label 'x'"),
        (PAIR, "has 1 rows, and a share of 0.1 of them is none"),
    ],
)
def test_a_wrong_file(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(PeftGraphError) as error:
        read(tmp_path, text)
    assert words in str(error.value)
    assert "d.jsonl" in str(error.value)


def test_parts_are_drawn_by_the_seed_and_share_no_row(tmp_path: Path) -> None:
    text = (
        "\n".join(json.dumps({"text": f"t {i}", "label": i % 3}) for i in range(40)) + '\n{"text": "rare", "label": 9}'
    )
    found = read(tmp_path, text, eval_share=0.5)
    lines = [{row.line for row in part} for part in (found.train, found.evaluation)]
    assert not lines[0] & lines[1]
    assert len(lines[0] | lines[1]) == 41
    assert found.labels == (0, 1, 2, 9)
    assert 41 in lines[0], "the only row of a label is trained on"
    assert read(tmp_path, text, eval_share=0.5) == found
    assert read(tmp_path, text, eval_share=0.5, seed=1).evaluation != found.evaluation


def test_a_file_to_evaluate_on_has_no_label_of_its_own(tmp_path: Path) -> None:
    other = tmp_path / "e.jsonl"
    other.write_text('{"text": "e", "label": "x"}')
    assert read(tmp_path, LABELLED, eval_data=other).evaluation[0].label == "x"
    other.write_text('{"text": "e", "label": "x"}\n{"text": "e", "label": "z"}')
    with pytest.raises(PeftGraphError, match="line 2: the label 'z' is on no row to train on; those have 'x', 'y'"):
        read(tmp_path, LABELLED, eval_data=other)


def test_the_task_is_what_the_fields_say_unless_it_is_given(tmp_path: Path) -> None:
    assert read(tmp_path, LABELLED, eval_share=0.0).task == "classification"
    assert read(tmp_path, LABELLED, eval_share=0.0, task="causal").task == "causal"
    with pytest.raises(PeftGraphError, match="task is one of classification|causal"):
        read(tmp_path, LABELLED, task="regression")


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ('lr = "high"', "[train] lr is a number, got 'high'"),
        ("batch = 2.5", "[train] batch is a whole number, got 2.5"),
        ("merge = 1", "[train] merge is true or false, got 1"),
        ("bacth = 2", "[train] has no key 'bacth'; did you mean 'batch'?"),
        ("data = 3", "[train] data is text, got 3"),
        ("batch = 0", "batch is at least 1, got 0"),
        ("warmup = 1.0", "warmup is a share, from 0 to below 1, got 1.0"),
        ("", "--data FILE is missing, and"),
    ],
)
def test_a_wrong_table(table: str, words: str, tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(f'[train]\nmodel = "m"\nout = "o"\n{table}\n[[pass]]\nuse = "lora"\n')
    given = {} if "missing" in words or "data" in table else {"data": tmp_path / "d"}
    with pytest.raises(PeftGraphError) as error:
        read_settings(str(recipe), given)
    assert words in str(error.value)


def test_the_command_line_comes_before_the_table_whose_paths_are_the_recipe_s(tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text('[train]\nmodel = "m"\nout = "o"\ndata = "d"\nlr = 1\nseed = 4\n[[pass]]\nuse = "lora"\n')
    found = read_settings(str(recipe), {"seed": 7, "out": Path("here"), "batch": None})
    assert (found.model, found.out, found.seed, found.lr) == (tmp_path / "m", Path("here"), 7, 1.0)


def test_mistakes_are_told_without_torch(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    for name in ("model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_text("")
    (tmp_path / "d.jsonl").write_text("{")
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom peftgraph.cli.app import app\n"
        "told = CliRunner().invoke(app, ['train', *sys.argv[1:]])\n"
        "print(told.stderr, sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    arguments = [str(tmp_path), "--data", str(tmp_path / "d.jsonl"), "--out", str(tmp_path / "o")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert "line 1 is no JSON" in done.stdout.replace("\n", " ")
    assert done.stdout.rstrip().endswith("[]")


def test_curves() -> None:
    assert moving_mean([(1, 2.0), (2, 4.0), (3, 6.0)], width=2) == [(1, 2.0), (2, 3.0), (3, 5.0)]
    for points in ([(1.0, 0.5)], [(0.0, 3.0), (10.0, 3.0)], [(0.0, 1e-9), (5.0, 1e9)]):
        drawn = curve(points, "loss & more", checks=True)
        assert drawn.count("<circle") == len(points)
        assert "loss &amp; more" in drawn
        assert "nan" not in drawn
