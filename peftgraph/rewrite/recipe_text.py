"""Reads what a recipe says, before any pass is loaded: a TOML file with one `[[pass]]` table a pass, `[patterns]`, and
`[train]` for `peftgraph train`; or the text of specs."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from peftgraph.errors import PeftGraphError, RecipeError, shortened
from peftgraph.rewrite.spec_text import parse_specs
from peftgraph.sites.patterns.pattern import Pattern
from peftgraph.utils.atomic_files import read_regular_file


@dataclass(frozen=True)
class PassText:
    """One pass of a recipe: its word, its options as text or as values of TOML, and where it stands ("" in a spec)."""

    word: str
    options: Mapping[str, Any]
    place: str = ""

    @contextmanager
    def located(self) -> Iterator[None]:
        """Put the place before the message of an error inside the block."""
        try:
            yield
        except RecipeError as error:
            if not self.place:
                raise
            raise RecipeError(f"{self.place}: {error}") from None


@dataclass(frozen=True)
class RecipeText:
    """A recipe as it was written.

    Attributes:
        passes: in order.
        patterns: those that selectors may refer to by name.
        place: the file, "" for the text of a spec.
        train: how `peftgraph train` trains it, as it was written.
    """

    passes: tuple[PassText, ...]
    patterns: Mapping[str, Pattern] = field(default_factory=dict)
    place: str = ""
    train: Mapping[str, Any] = field(default_factory=dict)


WORDS = re.compile(r"[\s,;]*\w+([\s,;]+\w+)*[\s,;]*")


def read_recipe(source: str | PathLike[str]) -> RecipeText:
    """Read the path of a `.toml` file or of a text file with specs, or the text of specs itself: it has a `{`, or is
    words alone, such as `lora; bitfit`.

    Raises:
        RecipeError: the file is missing, the text cannot be read, or it is the word of a pass and a file too.
    """
    if isinstance(source, str) and "{" in source:
        return _specs(source)
    if isinstance(source, str) and WORDS.fullmatch(source):
        if os.path.exists(source):
            raise RecipeError(f"{source!r} may be a pass or a file here: write {source}{{}} or ./{source}.")
        return _specs(source)
    if not isinstance(source, str | PathLike):
        raise RecipeError(f"A recipe is the path of a file, or a spec such as lora{{rank=8}}, got {source!r}.")
    try:
        path = Path(source)
        text = read_regular_file(path).decode()
    except (OSError, ValueError, TypeError) as error:
        raise RecipeError(f"The recipe {shortened(str(source))} cannot be read: {shortened(str(error))}") from None
    if path.suffix != ".toml":
        return _specs(text)
    try:
        document = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{path} is no TOML: {error}") from None
    return _from_document(document, str(path))


def read_specs(text: str) -> list[tuple[str, dict[str, str]]]:
    """Return the passes of a text as (word, options as text).

    Raises:
        RecipeError: it is no list of specs, or an empty one.
    """
    if not isinstance(text, str):
        raise RecipeError(f"A spec is text such as lora{{rank=8}}, got {type(text).__name__}.")
    specs = parse_specs(text)
    if not specs:
        raise RecipeError("An empty recipe: expected a spec such as lora{rank=8}.")
    return specs


def _specs(text: str) -> RecipeText:
    return RecipeText(tuple(PassText(word, options) for word, options in read_specs(text)))


def _from_document(document: dict[str, Any], where: str) -> RecipeText:
    tables = document.pop("pass", None)
    patterns = _patterns(document.pop("patterns", {}), where)
    train = document.pop("train", {})
    if document:
        raise RecipeError(
            f"{where}: unknown table {next(iter(document))!r}; a recipe holds [[pass]] tables, [patterns] and [train]."
        )
    if not isinstance(train, dict):
        raise RecipeError(f"{where}: [train] is a table with the options of peftgraph train, got {train!r}.")
    if not isinstance(tables, list) or not tables:
        raise RecipeError(f'{where}: a recipe needs at least one [[pass]] table with use = "lora" or another pass.')
    found: list[PassText] = []
    for number, table in enumerate(tables, start=1):
        if not isinstance(table, dict):
            raise RecipeError(f"{where}: [[pass]] number {number} is no table, but {table!r}.")
        word = table.pop("use", None)
        if not isinstance(word, str):
            raise RecipeError(f'{where}: [[pass]] number {number} needs use = "...", the name of a pass.')
        found.append(PassText(word, table, f"{where}: [[pass]] number {number}"))
    return RecipeText(tuple(found), patterns, where, train)


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
