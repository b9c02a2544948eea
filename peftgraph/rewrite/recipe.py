"""Recipe files: TOML with one `[[pass]]` table a pass, or plain text of printed specs."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from pathlib import Path
from typing import Any

from peftgraph.errors import RecipeError
from peftgraph.rewrite.method import Pass, Pipeline, find_pass, parse_pass
from peftgraph.rewrite.spec import build


def load_recipe(source: str | Path) -> Pass:
    """Reads a recipe.

    Args:
        source: the path of a `.toml` file or of a text file with specs; or the text of a spec itself (it holds a `{`).

    Raises:
        RecipeError: the file is missing or cannot be read; the message names the table and the option.
    """
    if isinstance(source, str) and "{" in source:
        return parse_pass(source)
    path = Path(source)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"The recipe {path} cannot be read: {error}") from None
    if path.suffix != ".toml":
        return parse_pass(text)
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{path} is no TOML: {error}") from None
    return _from_document(document, str(path))


def _from_document(document: dict[str, Any], where: str) -> Pass:
    tables = document.pop("pass", None)
    if document:
        raise RecipeError(f"{where}: unknown table {next(iter(document))!r}; a recipe holds [[pass]] tables only.")
    if not isinstance(tables, list) or not tables:
        raise RecipeError(f'{where}: a recipe needs at least one [[pass]] table with use = "lora" or another pass.')
    found = []
    for number, table in enumerate(tables, start=1):
        word = table.pop("use", None)
        if not isinstance(word, str):
            raise RecipeError(f'{where}: [[pass]] number {number} needs use = "...", the name of a pass.')
        try:
            found.append(build(find_pass(word), table))
        except RecipeError as error:
            raise RecipeError(f"{where}: [[pass]] number {number}: {error}") from None
    return found[0] if len(found) == 1 else Pipeline(found)


def to_toml(method: Pass) -> str:
    """The recipe file of a pass; `load_recipe` reads it back."""
    lines: list[str] = []
    for part in method.passes():
        lines += ["[[pass]]", f'use = "{part.word}"']
        for item in dataclasses.fields(part):
            value = getattr(part, item.name)
            if value is not None and value != "":
                plain = value if isinstance(value, int | float | str) else str(value)
                lines.append(f"{item.name} = {json.dumps(plain)}")  # JSON's numbers and strings are TOML's
        lines.append("")
    return "\n".join(lines)
