"""Sweeps: tests of one kind on more cases, which an ordinary run leaves out. `sweeps.txt` lists them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Sweep:
    """Tests that an ordinary run leaves out: those whose id matches, but for one in `kept` of them (0: none stays)."""

    pattern: re.Pattern[str]
    kept: int = 0

    def out(self, items: list[pytest.Item]) -> list[pytest.Item]:
        """Choose the tests that are left out."""
        matching = [item for item in items if self.pattern.fullmatch(_id(item))]
        return [item for number, item in enumerate(matching) if not self.kept or number % self.kept]


def listed() -> list[Sweep]:
    """Read sweeps.txt."""
    lines = (HERE / "sweeps.txt").read_text(encoding="utf-8").splitlines()
    return [_sweep(line) for line in lines if line and not line.startswith("#")]


def _sweep(line: str) -> Sweep:
    share = re.match(r"1/(\d+) ", line)
    return Sweep(re.compile(line)) if share is None else Sweep(re.compile(line[share.end() :]), int(share[1]))


def leave_out(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves the sweeps out, unless they are asked for or a test is named by its own id."""
    if config.getoption("--sweeps") or any("::" in str(one) for one in config.args):
        return
    sweeps = listed()
    if [str(one) for one in config.args] == config.getini("testpaths"):
        idle = [one.pattern.pattern for one in sweeps if not any(one.pattern.fullmatch(_id(item)) for item in items)]
        if idle:
            raise pytest.UsageError(f"tests/sweeps.txt names no test by {', '.join(idle)}")
    out = {item for one in sweeps for item in one.out(items)}
    config.hook.pytest_deselected(items=[item for item in items if item in out])
    items[:] = [item for item in items if item not in out]


def _id(item: pytest.Item) -> str:
    return item.nodeid.removeprefix("tests/")
