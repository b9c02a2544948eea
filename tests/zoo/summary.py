"""The zoo's report at the end of a run: rows travel with the test reports, so that parallel workers' rows meet in one
table. These are hooks of pytest; tests/conftest.py takes them in."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import pytest
from rich.console import Console

from .report import shortfalls, show, write
from .score import Row

PROPERTY = "zoo row"
WHOLE = (
    600  # rows of --zoo-all, from which on totals are judged: the chosen types are the odd ones more than their share
)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("zoo")
    group.addoption("--zoo-report", metavar="FILE", help="write the zoo's report to FILE, as Markdown")
    group.addoption("--zoo-all", action="store_true", help="every type that can be built, not only the chosen ones")


def rows_of(terminal: pytest.TerminalReporter) -> list[Row]:
    """The rows that came with the reports of all workers, in one order."""
    reports = [report for kind in ("passed", "failed") for report in terminal.stats.get(kind, [])]
    found = [value for report in reports for key, value in report.user_properties if key == PROPERTY]
    return sorted((Row.from_plain(value) for value in found), key=lambda row: (row.group, row.name))


@pytest.hookimpl(wrapper=True)
def pytest_sessionfinish(session: pytest.Session) -> Generator[None]:
    """The totals decide over the whole zoo only; parts of it are held to their known misses alone."""
    yield
    terminal = session.config.pluginmanager.get_plugin("terminalreporter")
    if terminal is None or hasattr(session.config, "workerinput"):
        return
    rows = rows_of(terminal)
    if len(rows) >= WHOLE and shortfalls(rows) and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = rows_of(terminalreporter)
    if not rows:
        return
    terminalreporter.section("zoo")
    show(rows, Console(width=160))
    if len(rows) >= WHOLE:
        for line in shortfalls(rows):
            terminalreporter.write_line(f"short: {line}", red=True)
    target = config.getoption("--zoo-report")
    if target:
        write(rows, Path(target))
