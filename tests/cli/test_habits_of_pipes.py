"""What programs that call the command line rely on: JSON of a stable shape, lines that nothing wraps, completion."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
import typer
import zoo
from typer.testing import CliRunner

from peftgraph.cli.app import app
from peftgraph.cli.cmd_completion import bash_script, commands_of, fish_script, zsh_script
from peftgraph.cli.cmd_doctor import examine
from peftgraph.model_folders.loading import load, trace
from peftgraph.utils.cache_folder import VARIABLE

SHAPES = {
    "apply": ["adapter", "diff", "folds", "model", "parameters", "reasons", "recipe", "sites"],
    "compare": ["batch", "inference_operations", "length", "model", "recipes"],
    "inspect": ["counts", "inputs", "layers", "layout", "model", "nodes", "parameters", "sites", "unmatched"],
    "explain": ["others", "problem", "reasons", "selector"],
    "cache": ["bytes", "folder", "most_bytes", "removed", "traces"],
    "merge": ["adapter", "by_shard", "copied", "left", "out", "proof", "rest", "source"],
    "shards": ["adapter", "by_shard", "changed", "copied", "kept_shards", "out", "report", "shards", "source"],
    "export": ["bytes", "file", "inputs", "left", "proof"],
    "doctor": ["cache", "devices", "executable", "packages", "passes", "peftgraph", "platform", "problems", "python"],
}


@pytest.fixture(scope="module")
def mixed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that folds in part."""
    torch.manual_seed(0)
    tuned = zoo.randomise(trace(load(folder)).apply("lora{rank=2}; serial_adapter{width=3}"))
    return tuned.save_adapter(tmp_path_factory.mktemp("adapters") / "mixed")


@pytest.fixture(scope="module")
def low_rank(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    tuned = zoo.randomise(trace(load(folder)).apply("lora{rank=2}"))
    return tuned.save_adapter(tmp_path_factory.mktemp("adapters") / "lora", format="peft")


def test_every_command_has_json_of_the_documented_shape(
    cli, folder: Path, low_rank: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    calls = {
        "apply": ("apply", folder, "--recipe", "lora; serial_adapter"),
        "compare": ("compare", folder, "--recipes", "ia3", "--batch", 2, "--length", 8),
        "inspect": ("inspect", folder),
        "explain": ("inspect", folder, "--explain", "attention.q", "--layer", 0),
        "cache": ("cache",),
        "merge": ("merge", folder, low_rank, "--whole", "--out", tmp_path / "merged"),
        "shards": ("merge", folder, low_rank, "--out", tmp_path / "shards"),
        "export": ("export", folder, "--out", tmp_path / "m.pt2"),
        "doctor": ("doctor",),
    }
    page = (Path(__file__).parents[2] / "docs" / "command-line.md").read_text(encoding="utf-8")
    for name, arguments in calls.items():
        result = cli(*arguments, "--json")
        assert result.exit_code == 0, (name, result.stderr)
        document = json.loads(result.stdout)
        assert sorted(document) == SHAPES[name], name
        assert all(f"`{key}`" in page for key in document), name


def test_a_pipe_is_not_wrapped_and_shows_texts_as_they_are(
    cli, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / f"[bold]{'long' * 40}:smile:"))
    (line,) = cli("cache").stdout.splitlines()
    assert f"[bold]{'long' * 40}:smile:: 0 traces" in line
    wide = max(map(len, cli("apply", folder, "--recipe", "lora{rank=2}").stdout.splitlines()))
    assert wide > 100
    out = tmp_path / ("[red]" + "x" * 90)
    assert f"adapter written to {out}\n" in cli("apply", folder, "--recipe", "lora", "--out", out).stdout


def test_help_shows_brackets(cli) -> None:
    assert '"peftgraph[demo]"' in " ".join(cli("quickstart", "--help").stdout.split())


def test_a_part_of_an_adapter_is_merged_and_the_rest_is_kept(cli, folder: Path, mixed: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    refused = cli("merge", folder, mixed, "--out", out)
    assert refused.exit_code == 1
    assert "peftgraph merge --partial folds the rest and keeps these as an adapter" in refused.stderr
    assert not out.exists()
    result = cli("merge", folder, mixed, "--out", out, "--partial")
    assert result.exit_code == 0, result.stderr
    assert f"adapter with what does not fold written to {out / 'adapter'}: serial_adapter{{" in result.stdout
    both = trace(load(out)).load_adapter(out / "adapter")
    assert [one.method.word for one in both.history] == ["serial_adapter"]
    tuned = trace(load(folder)).load_adapter(mixed)
    batch = zoo.example("bert")
    for found, expected in zip(
        zoo.leaves(both.module().eval()(**batch)), zoo.leaves(tuned.module().eval()(**batch)), strict=True
    ):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_a_partial_merge_of_what_folds_leaves_no_adapter_and_of_nothing_is_refused(
    cli, folder: Path, low_rank: Path, tmp_path: Path
) -> None:
    found = json.loads(cli("merge", folder, low_rank, "--out", tmp_path / "all", "--partial", "--json").stdout)
    assert (found["left"], found["rest"], (tmp_path / "all" / "adapter").exists()) == ([], None, False)
    trace(load(folder)).apply("serial_adapter{width=3}").save_adapter(tmp_path / "serial")
    nothing = cli("merge", folder, tmp_path / "serial", "--out", tmp_path / "none", "--partial")
    assert (nothing.exit_code, (tmp_path / "none").exists()) == (1, False)
    assert "Nothing of the adapter folds, so there is nothing to merge:\n  0.attention: " in nothing.stderr
    assert cli("merge", folder, low_rank, "--out", tmp_path / "x", "--partial", "--by-shard").exit_code == 2


def test_apply_says_what_is_left_and_shows_every_pass(cli, folder: Path) -> None:
    recipe = (
        "lora{at=attention.q&layer(0) rank=2}; ia3{at=attention.k&layer(1)}; serial_adapter{width=3 at=ffn&layer(1)}"
    )
    told = cli("apply", folder, "--recipe", recipe).stdout
    for shown in ("+ %0.attention.q.lora", "+ %1.attention.k.ia3", "+ %1.ffn.serial_adapter"):
        assert shown in told
    assert "none are left after folding" not in told
    left = trace(load(folder)).apply("serial_adapter{width=3 at=ffn&layer(1)}").count().added
    assert f"parameters that the recipe adds; {left:,} are left after folding" in told
    assert "does not fold completely, 1 of 3 edits stay:\n  1.ffn: " in told
    assert "none are left after folding" in cli("apply", folder, "--recipe", "lora{rank=2}").stdout
    nothing = cli("apply", folder, "--recipe", "train{at=norm}").stdout
    assert "parameters that the recipe adds" in nothing
    assert "left after folding" not in nothing


def test_a_table_in_a_pipe_is_whole(folder: Path) -> None:
    """Whatever the width of a terminal is said to be."""
    result = CliRunner().invoke(app, ["apply", str(folder), "--recipe", "lora{rank=2}"], env={"COLUMNS": "40"})
    assert "parameters that the recipe adds; none are left after folding" in result.stdout


def test_changes_outside_the_layers_are_shown(cli, folder: Path) -> None:
    told = cli("apply", folder, "--recipe", "lora{rank=2}; lora{at=embedding rank=2 name=rows}").stdout
    assert "+ %embedding" in told
    assert "+ %0.attention.q.lora" in told


def test_no_command_is_without_json_and_the_page_lists_them_all() -> None:
    commands = commands_of(typer.main.get_command(app))
    page = (Path(__file__).parents[2] / "docs" / "command-line.md").read_text(encoding="utf-8")
    shapes = page.partition("## JSON")[2]
    for name, (_, words) in commands.items():
        if name not in ("", "completion"):
            assert any("--json" in word.names for word in words), name
            assert f"| `{name}` |" in shapes, name
            assert f"| `{name}" in page.partition("## JSON")[0], name


def test_completion_scripts_have_every_command_and_option() -> None:
    commands = commands_of(typer.main.get_command(app))
    assert {"merge", "doctor", "completion"} <= commands.keys()
    for make in (bash_script, zsh_script, fish_script):
        text = "\n".join(make(commands))
        for word in ("merge", "partial", "no-cache", "regions", "quickstart"):
            assert word in text, (make.__name__, word)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("peftgraph me", "merge"),
        ("peftgraph merge --p", "--prove --partial"),
        ("peftgraph merge --prove o", "outputs"),
        ("peftgraph --debug completion ", "bash zsh fish"),
        ("peftgraph merge some", ""),
    ],
)
def test_bash_completes(line: str, words: str) -> None:
    call = (
        "COMP_WORDS=($1); [[ $1 == *' ' ]] && COMP_WORDS+=(''); COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); COMPREPLY=(); "
        '_peftgraph; echo "${COMPREPLY[*]}"'
    )
    script = "\n".join([*bash_script(commands_of(typer.main.get_command(app))), call])
    done = subprocess.run(["bash", "-c", script, "bash", line], capture_output=True, text=True, check=True)
    assert (done.stdout.strip(), done.stderr) == (words, "")


def test_the_doctor_names_what_is_missing(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from peftgraph.cli import cmd_doctor

    found = examine()
    assert found["problems"] == []
    rows = {row["name"]: row for row in found["packages"]}
    assert rows["torch"]["version"] == torch.__version__
    assert (rows["onnx"]["extra"], rows["torch"]["extra"]) == ("onnx", "")
    assert "lora" in found["passes"]["peftgraph"]
    monkeypatch.setattr(
        cmd_doctor, "requires", lambda name: ["torch>=99", "nowhere>=1", 'absent>=1; extra == "onnx"', "numpy>=1"]
    )
    result = cli("doctor")
    assert result.exit_code == 1
    assert f"problem torch {torch.__version__} is not supported: >=99\n" in result.stdout
    assert "problem nowhere  is not installed: >=1\n" in result.stdout
    assert "absent" in result.stdout
    assert "problem absent" not in result.stdout


def test_refusals_name_options(cli, tmp_path: Path) -> None:
    folder = tmp_path / "tied"
    zoo.build("gpt2").save_pretrained(folder)  # pyright: ignore[reportCallIssue]
    tuned = zoo.randomise(trace(load(folder)).apply("lora{at=head rank=2}"))
    tuned.save_adapter(tmp_path / "a")
    result = cli("merge", folder, tmp_path / "a", "--whole", "--out", tmp_path / "m")
    assert result.exit_code == 1
    assert "peftgraph merge --whole --untie gives it a tensor of its own" in result.stderr
    assert "pg.fold" not in result.stderr
    done = cli("merge", folder, tmp_path / "a", "--whole", "--untie", "--out", tmp_path / "m")
    assert done.exit_code == 0, done.stderr
    trace(load(folder)).apply("lora{at=head|ffn.up rank=2}").save_adapter(tmp_path / "b")
    some = cli("merge", folder, tmp_path / "b", "--partial", "--out", tmp_path / "n")
    assert (some.exit_code, (tmp_path / "n").exists()) == (1, False)
    assert "folds at 2 of its 3 sites, and an adapter holds whole passes. It does not fold at head: give" in some.stderr
