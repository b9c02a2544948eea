"""Every example in docs/ runs as it stands and prints what the page says.

The Python blocks of a page run one after the other in one namespace. A `text` block is what the Python block before it
prints; a `toml` block is a file, named by the comment in its first line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parent.parent / "docs"
FENCE = re.compile(r"^```(python|text|toml)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    for match in FENCE.finditer(page.read_text(encoding="utf-8")):
        yield match[1], match[2]


def executed() -> list[Path]:
    return [page for page in sorted(DOCS.rglob("*.md")) if any(kind == "python" for kind, _ in blocks(page))]


@pytest.mark.parametrize("page", executed(), ids=lambda page: page.name)
def test_the_examples_of_a_page(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for path in re.findall(r"^# (\S+\.toml)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE):
        (content,) = (body for kind, body in blocks(page) if kind == "toml" and body.startswith(f"# {path}\n"))
        (tmp_path / path).write_text(content)
    namespace: dict[str, Any] = {}
    printed = ""
    for number, (kind, body) in enumerate(blocks(page), start=1):
        if kind == "python":
            exec(compile(body, f"{page.name}, block {number}", "exec"), namespace)
            printed = capsys.readouterr().out
        elif kind == "text":
            assert printed == body, f"{page.name}, block {number}"


def test_there_are_pages_to_execute() -> None:
    assert "patterns.md" in {page.name for page in executed()}
