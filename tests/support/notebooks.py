"""Runs the notebooks of docs/notebooks cell by cell, as Jupyter does, and stores what they print.

python tests/support/notebooks.py [NAME ...]    runs them and stores their outputs
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[2] / "docs" / "notebooks"


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def printed(cell: dict[str, Any]) -> str:
    """Return what the stored outputs of a cell say as text."""
    texts = ["".join(one["text"]) for one in cell["outputs"] if one["output_type"] == "stream"]
    texts += ["".join(one["data"]["text/plain"]) + "\n" for one in cell["outputs"] if one["output_type"] != "stream"]
    return "".join(texts)


def run(notebook: dict[str, Any], name: str) -> Iterator[list[dict[str, Any]]]:
    """Run the code cells in one namespace; yield the outputs of each. Lines that begin with % or ! are Jupyter's."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(code_cells(notebook), start=1):
        lines = "".join(cell["source"]).splitlines()
        source = "\n".join(line for line in lines if line[:1] not in ("%", "!"))
        yield _run(source, f"{name}, cell {number}", namespace, number)


def _run(source: str, where: str, namespace: dict[str, Any], number: int) -> list[dict[str, Any]]:
    tree, out, value = ast.parse(source, where), io.StringIO(), None
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(out):
        exec(compile(tree, where, "exec"), namespace)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), where, "eval"), namespace)
    outputs: list[dict[str, Any]] = []
    if out.getvalue():
        outputs.append({"name": "stdout", "output_type": "stream", "text": out.getvalue().splitlines(keepends=True)})
    if value is not None:
        data: dict[str, Any] = {"text/plain": repr(value).splitlines(keepends=True)}
        if hasattr(value, "_repr_html_"):
            data = {"text/html": value._repr_html_().splitlines(keepends=True), **data}
        outputs.append({"data": data, "execution_count": number, "metadata": {}, "output_type": "execute_result"})
    return outputs


def store(path: Path) -> None:
    """Run a notebook in an empty folder and store its outputs."""
    notebook = read(path)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for number, (cell, outputs) in enumerate(
            zip(code_cells(notebook), run(notebook, path.name), strict=True), start=1
        ):
            cell |= {"outputs": outputs, "execution_count": number}
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    for one in sorted(FOLDER.glob("*.ipynb")):
        if not sys.argv[1:] or one.stem in sys.argv[1:]:
            store(one)
            print(one.name)
