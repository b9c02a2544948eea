"""What a user can do wrong ends in one line on stderr and the right exit code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

CONFIG = {"model_type": "bert", "architectures": ["BertModel"], "hidden_size": 48, "num_attention_heads": 6}


def config(path: Path, text: str) -> Path:
    (path / "config.json").write_text(text)
    return path


def broken(path: Path) -> dict[str, tuple[Path, str]]:
    """Each kind of broken input, and the words its message must hold."""
    folders = {name: path / name for name in ("empty", "text", "list", "unknown", "class", "untyped", "sizes", "typo")}
    for folder in folders.values():
        folder.mkdir()
    return {
        "missing": (path / "nowhere", "does not exist"),
        "empty": (folders["empty"], "contains no config.json"),
        "text": (config(folders["text"], '{"model_type": "bert",'), "cannot be read as JSON"),
        "list": (config(folders["list"], "[1, 2]"), "no JSON object"),
        "unknown": (config(folders["unknown"], '{"model_type": "zzzz"}'), "no architecture 'zzzz'"),
        "typo": (config(folders["typo"], '{"model_type": "robertaa"}'), "Did you mean 'roberta'?"),
        "untyped": (config(folders["untyped"], "{}"), "does not say its model_type"),
        "class": (config(folders["class"], json.dumps({**CONFIG, "architectures": ["Nope"]})), "no class 'Nope'"),
        "sizes": (config(folders["sizes"], json.dumps({**CONFIG, "num_attention_heads": 7})), "cannot be built"),
    }


KINDS = ("missing", "empty", "text", "list", "unknown", "typo", "untyped", "class", "sizes")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("command", [("inspect",), ("apply", "--recipe", "lora{}")])
def test_a_broken_input_is_one_line_and_exit_code_1(cli, tmp_path: Path, kind: str, command: tuple[str, ...]) -> None:
    source, words = broken(tmp_path)[kind]
    result = cli(command[0], source, *command[1:])
    assert result.exit_code == 1
    message, hint = result.stderr.strip().splitlines()
    assert message.startswith("error: ")
    assert words in message
    assert "--debug" in hint
    assert result.stdout == ""


def test_debug_shows_the_traceback(cli, tmp_path: Path) -> None:
    result = cli("--debug", "inspect", tmp_path / "nowhere")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert "does not exist" in result.stderr


@pytest.mark.parametrize(
    "arguments", [["nonsense"], ["inspect"], ["inspect", "x", "--nonsense"], ["quickstart", "--steps", "0"]]
)
def test_wrong_usage_is_exit_code_2(cli, arguments: list[str]) -> None:
    assert cli(*arguments).exit_code == 2


def test_a_bug_is_exit_code_3(cli, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peftgraph.cli import cmd_inspect

    def fail(source: Path) -> None:
        raise KeyError("surprise")

    monkeypatch.setattr(cmd_inspect, "skeleton", fail)
    result = cli("inspect", folder)
    assert result.exit_code == 3
    assert "this is a bug in peftgraph: KeyError" in result.stderr


def test_a_bad_selector_and_a_bad_recipe_are_the_users_errors(cli, folder: Path, tmp_path: Path) -> None:
    assert cli("inspect", folder, "--at", "attention.x").exit_code == 1
    result = cli("apply", folder, "--recipe", "loar{}")
    assert result.exit_code == 1
    assert "Did you mean 'lora'?" in result.stderr
    assert cli("apply", folder, "--recipe", tmp_path / "missing.toml").exit_code == 1


@pytest.mark.parametrize("command", ["merge", "export", "apply"])
def test_commands_that_need_weights_say_so(cli, folder: Path, tmp_path: Path, command: str) -> None:
    source = tmp_path / "config-only"
    source.mkdir()
    shutil.copy(folder / "config.json", source)
    extra = {"merge": ["adapter", "--out", tmp_path / "m"], "export": ["--out", tmp_path / "m.pt2"]}
    result = cli(command, source, *extra.get(command, ["--recipe", "lora{}", "--out", tmp_path / "a"]))
    assert result.exit_code == 1
    assert "contains no weights (model.safetensors)" in result.stderr


def test_damaged_and_incomplete_weights_are_refused(cli, folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    damaged = shutil.copytree(folder, tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"no tensors at all")
    result = cli("export", damaged, "--out", tmp_path / "m.pt2")
    assert result.exit_code == 1
    assert "cannot be loaded" in result.stderr

    partial = shutil.copytree(folder, tmp_path / "partial")
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("encoder.layer.0.attention.self.query.weight")
    save_file(tensors, partial / "model.safetensors", {"format": "pt"})
    result = cli("export", partial, "--out", tmp_path / "m.pt2")
    assert result.exit_code == 1
    assert "lack 1 of BertModel's tensors, encoder.layer.0.attention.self.query.weight" in result.stderr
