"""apply --out, merge and export, from files to files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import zoo
from transformers import AutoModel

import peftgraph as pg
from peftgraph.model_folders.loading import load, trace
from peftgraph.model_folders.output_folder import note_made

RECIPE = "lora{rank=2}; ia3{}"


@pytest.fixture(scope="module")
def adapter(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the small BERT with non-zero parameters."""
    torch.manual_seed(0)
    tuned = zoo.randomise(trace(load(folder)).apply(pg.load_recipe(RECIPE)))
    return tuned.save_adapter(tmp_path_factory.mktemp("adapters") / "a")


def outputs(net: torch.nn.Module) -> list[torch.Tensor]:
    torch.manual_seed(3)
    with torch.no_grad():
        return zoo.leaves(net.eval()(**zoo.example("bert")))


def test_apply_shows_one_layer_and_the_counts(cli, folder: Path) -> None:
    result = cli("apply", folder, "--recipe", RECIPE)
    assert result.exit_code == 0, result.stderr
    assert "+ %0.attention.q.lora" in result.stdout
    assert "%1.attention.q" not in result.stdout
    assert "more lines like these" in result.stdout
    for word in ("trainable", "added", "changed", "total", "folds completely"):
        assert word in result.stdout


def test_apply_says_why_a_recipe_does_not_fold(cli, folder: Path) -> None:
    result = cli("apply", folder, "--recipe", "serial_adapter{width=4}")
    assert result.exit_code == 0
    assert "does not fold completely" in result.stdout
    assert "nonlinear" in result.stdout


def test_apply_writes_a_fresh_adapter_that_loads(cli, folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[[pass]]\nuse = "lora"\nrank = 3\n')
    result = cli("apply", folder, "--recipe", recipe, "--out", tmp_path / "a")
    assert result.exit_code == 0, result.stderr
    tuned = trace(load(folder)).load_adapter(tmp_path / "a")
    assert "rank=3" in str(tuned.recipe)


def test_merge_of_an_adapter_in_pefts_format(cli, folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tuned = zoo.randomise(trace(load(folder)).apply(pg.parse_pass("lora{rank=2}")))
    result = cli("merge", folder, tuned.save_adapter(tmp_path / "a", format="peft"), "--out", tmp_path / "merged")
    assert result.exit_code == 0, result.stderr
    for ours, merged in zip(outputs(tuned.module()), outputs(load(tmp_path / "merged")), strict=True):
        torch.testing.assert_close(merged, ours, rtol=1e-4, atol=1e-5)


def test_merge_round_trip(cli, folder: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    result = cli("merge", folder, adapter, "--out", out)
    assert result.exit_code == 0, result.stderr
    assert "equal to the base's text" in result.stdout
    assert (out / "tokenizer.json").read_text() == "{}"
    merged = pg.fold(trace(load(folder)).load_adapter(adapter))
    for found, expected in zip(outputs(AutoModel.from_pretrained(out)), outputs(merged.module()), strict=True):
        assert torch.equal(found, expected)
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_merge_overwrites_only_when_forced(cli, folder: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    result = cli("merge", folder, adapter, "--out", out)
    assert result.exit_code == 1
    assert "--force replaces it" in result.stderr
    assert (out / "precious.txt").exists()
    assert "was not made by this command" in cli("merge", folder, adapter, "--out", out, "--force").stderr
    assert (out / "precious.txt").exists()
    note_made(out, "")
    assert cli("merge", folder, adapter, "--out", out, "--force").exit_code == 0
    assert not (out / "precious.txt").exists()
    assert (out / "model.safetensors").exists()


def test_a_merge_that_fails_leaves_nothing(cli, folder: Path, tmp_path: Path) -> None:
    recipe = trace(load(folder)).apply(pg.load_recipe("serial_adapter{width=4}"))
    recipe.save_adapter(tmp_path / "a")
    result = cli("merge", folder, tmp_path / "a", "--out", tmp_path / "merged")
    assert result.exit_code == 1
    assert "cannot be folded exactly" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_merge_refuses_what_is_no_adapter(cli, folder: Path, tmp_path: Path) -> None:
    result = cli("merge", folder, tmp_path, "--out", tmp_path / "merged")
    assert result.exit_code == 1
    assert "no adapter directory" in result.stderr


def test_export_pt2_with_an_adapter(cli, folder: Path, adapter: Path, tmp_path: Path) -> None:
    result = cli("export", folder, "--adapter", adapter, "--out", tmp_path / "m.pt2")
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "m.pt2").stat().st_size > 10_000
    assert torch.export.load(tmp_path / "m.pt2").graph_signature.user_inputs[0] == "input_ids"


def test_export_knows_its_suffixes(cli, folder: Path, tmp_path: Path) -> None:
    result = cli("export", folder, "--out", tmp_path / "m.txt")
    assert result.exit_code == 1
    assert ".onnx, .pt2" in result.stderr
