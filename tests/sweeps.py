"""Sweeps: tests of one kind on more cases, which an ordinary run leaves out. `sweeps.txt` lists them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def listed() -> list[re.Pattern[str]]:
    """The expressions of sweeps.txt."""
    lines = (HERE / "sweeps.txt").read_text(encoding="utf-8").splitlines()
    return [re.compile(line) for line in lines if line and not line.startswith("#")]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves the sweeps out, unless they are asked for or a test is named by its own id."""
    if config.getoption("--sweeps") or any("::" in str(one) for one in config.args):
        return
    patterns = listed()
    if [str(one) for one in config.args] == config.getini("testpaths"):
        idle = [one.pattern for one in patterns if not any(one.fullmatch(_id(item)) for item in items)]
        if idle:
            raise pytest.UsageError(f"tests/sweeps.txt names no test by {', '.join(idle)}")
    out = [item for item in items if any(one.fullmatch(_id(item)) for one in patterns)]
    items[:] = [item for item in items if item not in set(out)]
    config.hook.pytest_deselected(items=out)


def _id(item: pytest.Item) -> str:
    return item.nodeid.removeprefix("tests/")
