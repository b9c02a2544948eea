"""Shared fixtures. Every test starts from the same seed, and no test reaches the network."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from tests.zoo.summary import pytest_addoption as pytest_addoption
from tests.zoo.summary import pytest_sessionfinish as pytest_sessionfinish
from tests.zoo.summary import pytest_terminal_summary as pytest_terminal_summary

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parent / "support"))  # makes `import zoo` work in every test folder


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
