"""Recipe files: TOML with one `[[pass]]` table a pass, or plain text of printed specs.

A TOML recipe may define sites of its own, `[patterns]` with one `name = "equations"` a pattern, and use them by name:
`at = "swiglu.gate & layers(0, 2)"`. The passes carry what they use, so the names end with the file.
"""

from __future__ import annotations

import dataclasses
import json
import tomllib
from os import PathLike
from pathlib import Path
from typing import Any

from peftgraph.errors import PeftGraphError, RecipeError, shortened
from peftgraph.rewrite.method import Pass, Pipeline
from peftgraph.rewrite.registry import find_pass
from peftgraph.rewrite.spec import build, parse_pass
from peftgraph.rewrite.spec_text import print_value
from peftgraph.sites import Pattern
from peftgraph.sites.patterns.pattern import patterns_of
from peftgraph.utils.atomic_files import read_regular_file


def load_recipe(source: str | Path) -> Pass:
    """Read a recipe.

    Args:
        source: the path of a `.toml` file or of a text file with specs; or the text of a spec itself (it contains a
            `{`).

    Raises:
        RecipeError: the file is missing or cannot be read; the message names the table and the option.
    """
    if isinstance(source, str) and "{" in source:
        return parse_pass(source)
    if not isinstance(source, str | PathLike):
        raise RecipeError(f"A recipe is the path of a file, or a spec such as lora{{rank=8}}, got {source!r}.")
    try:
        path = Path(source)
        text = read_regular_file(path).decode()
    except (OSError, ValueError, TypeError) as error:
        raise RecipeError(f"The recipe {shortened(str(source))} cannot be read: {shortened(str(error))}") from None
    if path.suffix != ".toml":
        return parse_pass(text)
    try:
        document = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{path} is no TOML: {error}") from None
    return _from_document(document, str(path))


def parse_recipe(text: str) -> Pass:
    """Read a recipe that is a word alone, a spec, or the path of a file.

    Raises:
        RecipeError: it is none of them.
    """
    word = text.strip()
    return parse_pass(f"{word}{{}}") if word.isidentifier() else load_recipe(text)


def _from_document(document: dict[str, Any], where: str) -> Pass:
    tables = document.pop("pass", None)
    patterns = _patterns(document.pop("patterns", {}), where)
    if document:
        raise RecipeError(
            f"{where}: unknown table {next(iter(document))!r}; a recipe holds [[pass]] tables and [patterns]."
        )
    if not isinstance(tables, list) or not tables:
        raise RecipeError(f'{where}: a recipe needs at least one [[pass]] table with use = "lora" or another pass.')
    found = []
    for number, table in enumerate(tables, start=1):
        if not isinstance(table, dict):
            raise RecipeError(f"{where}: [[pass]] number {number} is no table, but {table!r}.")
        word = table.pop("use", None)
        if not isinstance(word, str):
            raise RecipeError(f'{where}: [[pass]] number {number} needs use = "...", the name of a pass.')
        try:
            found.append(build(find_pass(word), table, patterns))
        except RecipeError as error:
            raise RecipeError(f"{where}: [[pass]] number {number}: {error}") from None
    used = {pattern.name for part in found for pattern in patterns_of_pass(part)}
    idle = next((name for name in patterns if name not in used), None)
    if idle is not None:
        raise RecipeError(f"{where}: the pattern {idle!r} is used by no pass.")
    return found[0] if len(found) == 1 else Pipeline(found)


def _patterns(table: Any, where: str) -> dict[str, Pattern]:
    if not isinstance(table, dict) or not all(isinstance(text, str) for text in table.values()):
        raise RecipeError(f'{where}: [patterns] holds lines such as swiglu = "down = linear(...); gate = ...".')
    found: dict[str, Pattern] = {}
    for name, text in table.items():
        try:
            found[name] = Pattern(name, text)
        except PeftGraphError as error:
            raise RecipeError(f"{where}: [patterns] {name}: {error}") from None
    return found


def patterns_of_pass(method: Pass) -> tuple[Pattern, ...]:
    """Return the patterns that a pass refers to, each once."""
    return tuple(dict.fromkeys(pattern for rule in method.rules() for pattern in patterns_of(rule.at)))


def to_toml(method: Pass) -> str:
    """Return the recipe file of a pass; `load_recipe` reads it back."""
    patterns = patterns_of_pass(method)
    lines = [f"{_toml(p.name)} = {_toml(str(p).partition(': ')[2])}" for p in patterns]
    lines = ["[patterns]", *lines, ""] if lines else []
    for part in method.passes():
        lines += ["[[pass]]", f'use = "{part.word}"']
        for item in dataclasses.fields(part):
            value = getattr(part, item.name)
            if value is not None and value != "":
                plain = value if isinstance(value, int | float | str) else _named(print_value(value), patterns)
                lines.append(f"{item.name} = {_toml(plain)}")
        lines.append("")
    return "\n".join(lines)


def _toml(value: float | str) -> str:
    """Format a number or a text for TOML: as in JSON, except for non-ASCII text and one control character."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _named(text: str, patterns: tuple[Pattern, ...]) -> str:
    """Return the text of an option, with the file's patterns by name."""
    for pattern in patterns:
        text = text.replace(pattern.reference, pattern.name)
    return text
