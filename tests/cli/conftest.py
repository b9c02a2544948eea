"""The command line, run in this process on small models saved to disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import zoo
from typer.testing import CliRunner, Result

from peftgraph.cli.app import app

Run = Callable[..., Result]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small BERT as a transformers folder, with a file that stands for its tokenizer."""
    path = tmp_path_factory.mktemp("models") / "bert"
    zoo.build("bert").save_pretrained(path)  # pyright: ignore[reportCallIssue]
    (path / "tokenizer.json").write_text("{}")
    return path


@pytest.fixture
def cli() -> Run:
    """cli("inspect", folder): the result of a command; exceptions that it lets out fail the test."""

    def run(*arguments: object) -> Result:
        torch.manual_seed(0)
        return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "160"})

    return run
