"""The notebooks of docs/notebooks run as they stand, and what is stored in them is what they print."""

from __future__ import annotations

import json
import re
from pathlib import Path

import notebooks
import pytest

NAMES = ("first-lora", "merge-and-export", "your-own-method")


def test_these_are_all() -> None:
    assert [path.stem for path in sorted(notebooks.FOLDER.glob("*.ipynb"))] == list(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_prints_what_is_stored(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    notebook = notebooks.read(notebooks.FOLDER / f"{name}.ipynb")
    for cell, outputs in zip(notebooks.code_cells(notebook), notebooks.run(notebook, name), strict=True):
        assert notebooks.printed({"outputs": outputs}) == notebooks.printed(cell)
        kinds = [[sorted(one.get("data", ())) for one in found] for found in (outputs, cell["outputs"])]
        assert kinds[0] == kinds[1]


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_complete(name: str) -> None:
    notebook = notebooks.read(notebooks.FOLDER / f"{name}.ipynb")
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    cells = notebooks.code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert notebook["cells"][0]["cell_type"] == "markdown"
    assert not re.search(r"0x[0-9a-f]{6,}", json.dumps(notebook)), "an address of memory"


def test_a_cell_that_fails_is_an_error_and_only_the_last_expression_is_shown() -> None:
    cells = [{"cell_type": "code", "source": ["%pip install x\n", "a = 2\n", "a\n", "print(a)\n", "a + 1"]}]
    (outputs,) = notebooks.run({"cells": cells}, "n")
    assert notebooks.printed({"outputs": outputs}) == "2\n3\n"
    with pytest.raises(ZeroDivisionError):
        list(notebooks.run({"cells": [{"cell_type": "code", "source": ["1 / 0"]}]}, "n"))
