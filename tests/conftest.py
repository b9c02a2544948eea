"""Shared fixtures. Every test starts from the same seed, and no test reaches the network."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from tests import fast, sweeps
from tests.fast import pytest_configure as pytest_configure
from tests.zoo import summary
from tests.zoo.summary import pytest_sessionfinish as pytest_sessionfinish
from tests.zoo.summary import pytest_terminal_summary as pytest_terminal_summary

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
FOLDER = tempfile.TemporaryDirectory(prefix="peftgraph-cache-")  # of this run: what it keeps is not the user's
os.environ["PEFTGRAPH_CACHE"] = FOLDER.name
sys.path.insert(0, str(Path(__file__).parent / "support"))  # makes `import zoo` work in every test folder


def pytest_addoption(parser: pytest.Parser) -> None:
    summary.pytest_addoption(parser)
    parser.addoption("--sweeps", action="store_true", help="also what tests/sweeps.txt keeps out of an ordinary run")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    fast.mark(items)
    sweeps.leave_out(config, items)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
