"""Recipe files: TOML with one `[[pass]]` table a pass, or plain text of printed specs.

A TOML recipe may define sites of its own, `[patterns]` with one `name = "equations"` a pattern, and use them by name:
`at = "swiglu.gate & layers(0, 2)"`. The passes carry what they use, so the names end with the file.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from os import PathLike
from typing import Any

from peftgraph.errors import RecipeError
from peftgraph.rewrite.method import Pass, Pipeline
from peftgraph.rewrite.peft_options import CONFIGS
from peftgraph.rewrite.recipe_text import RecipeText, read_recipe
from peftgraph.rewrite.registry import find_pass
from peftgraph.rewrite.spec import build
from peftgraph.rewrite.spec_text import print_value
from peftgraph.sites.patterns.pattern import Pattern, patterns_of


def load_recipe(source: str | PathLike[str]) -> Pass:
    """Read a recipe.

    Args:
        source: the path of a `.toml` file or of a text file with specs; or the text itself, such as `lora{rank=8}` or
            `lora; bitfit`.

    Raises:
        RecipeError: the file is missing or cannot be read; the message names the table and the option.
    """
    return _built(read_recipe(source))


Methods = Pass | str | PathLike[str] | Iterable["Methods"]


def as_passes(methods: Iterable[Methods]) -> tuple[Pass, ...]:
    """Return passes that were given as passes, as the text or the file of a recipe, or as lists of these.

    Raises:
        RecipeError: something is none of them, or cannot be read.
    """
    return tuple(found for one in methods for found in _as_passes(one))


def as_pass(methods: Methods) -> Pass:
    """Return one pass that was given in any of the ways of `as_passes`; a list is a pipeline.

    Raises:
        RecipeError: it is none of them, or cannot be read.
    """
    found = as_passes([methods])
    return found[0] if len(found) == 1 else Pipeline(found)


def _as_passes(given: Any) -> tuple[Pass, ...]:
    if isinstance(given, Pass):
        return (given,)
    if isinstance(given, str | PathLike):
        return (load_recipe(given),)
    if isinstance(given, list | tuple):
        return as_passes(given)
    if isinstance(given, type) and issubclass(given, Pass):
        raise RecipeError(f"{given.__name__} is a class of passes: write {given.__name__}(), or {given.word!r}.")
    kind = type(given).__name__
    known = next((config for config in CONFIGS if config.name == kind), None)
    hint = "" if known is None else f" What peft configures with it is the pass {known.word!r}."
    raise RecipeError(f"apply() takes passes such as LoRA(rank=8), or their text, got {kind}.{hint}")


def _built(recipe: RecipeText) -> Pass:
    found: list[Pass] = []
    for one in recipe.passes:
        with one.located():
            found.append(build(find_pass(one.word), dict(one.options), recipe.patterns))
    used = {pattern.name for part in found for pattern in patterns_of_pass(part)}
    idle = next((name for name in recipe.patterns if name not in used), None)
    if idle is not None:
        raise RecipeError(f"{recipe.place}: the pattern {idle!r} is used by no pass.")
    return found[0] if len(found) == 1 else Pipeline(found)


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
