"""The README's example runs as it stands, and its two set-up commands are the ones that CI knows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 1
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    for code in blocks:
        exec(compile(code, "README.md", "exec"), scope)
    printed = capsys.readouterr().out
    assert "+ %0.attention.q.lora.linear" in printed
    assert "equal to the base's text" in printed
    assert (tmp_path / "adapter" / "adapter.json").exists()
    assert (tmp_path / "merged" / "model.safetensors").exists()


def test_what_it_points_at_exists() -> None:
    text = README.read_text(encoding="utf-8")
    targets = [one for one in re.findall(r"\]\(([^)#]+)", text) if not one.startswith("http")]
    assert len(targets) > 20
    assert [one for one in targets if not (README.parent / one).exists()] == []


def test_there_are_exactly_two_set_up_commands() -> None:
    commands = [
        line for line in README.read_text(encoding="utf-8").splitlines() if line.startswith("    python -m venv")
    ]
    assert len(commands) == 2
    assert "quickstart" in commands[0]
    assert "pytest" in commands[1]
