"""The mark `fast`: a part of the tests that says within two minutes whether a change broke something common."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = [one for one in (HERE / "fast.txt").read_text(encoding="utf-8").splitlines() if not one.startswith("#")]


def pytest_configure(config: pytest.Config) -> None:
    """Register the mark."""
    config.addinivalue_line("markers", "fast: a sample of every room, under two minutes in all")


def mark(items: list[pytest.Item]) -> None:
    """Mark the tests of the listed files.

    Raises:
        UsageError: a listed file does not exist.
    """
    missing = [name for name in FILES if not (HERE / f"{name}.py").exists()]
    if missing:
        raise pytest.UsageError(f"tests/fast.txt names no file by {', '.join(missing)}")
    for item in items:
        if item.path.relative_to(HERE).with_suffix("").as_posix() in FILES:
            item.add_marker(pytest.mark.fast)
