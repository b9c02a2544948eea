"""The README's examples run as they stand, and its two set-up commands are the ones that CI knows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 2
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    for code in blocks:  # the second goes on where the first ends
        exec(compile(code, "README.md", "exec"), scope)
    printed = capsys.readouterr().out
    assert "+ %0.attention.q.lora.linear" in printed
    assert "equal to the base's text" in printed
    assert (tmp_path / "adapter" / "adapter.json").exists()


def test_there_are_exactly_two_set_up_commands() -> None:
    commands = [
        line for line in README.read_text(encoding="utf-8").splitlines() if line.startswith("    python -m venv")
    ]
    assert len(commands) == 2
    assert "quickstart" in commands[0]
    assert "pytest" in commands[1]
