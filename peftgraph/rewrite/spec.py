"""Specs: a pass prints as `lora{at=attention.q|attention.v rank=8 ...}` and the text parses back to an equal pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from peftgraph.rewrite.method import Pass, Pipeline
from peftgraph.rewrite.option_text import convert_options, require_given
from peftgraph.rewrite.options import hints, read_passes_with
from peftgraph.rewrite.recipe_text import read_specs
from peftgraph.rewrite.registry import find_pass
from peftgraph.sites.patterns.pattern import Pattern


def parse_pass(text: str, patterns: Mapping[str, Pattern] = MappingProxyType({})) -> Pass:
    """Read a pass from its spec, or a `Pipeline` from several; the inverse of `str(method)`.

    Args:
        text: the specs.
        patterns: the patterns that selectors may refer to by name.

    Raises:
        RecipeError: the text cannot be read.
    """
    specs = read_specs(text)
    classes = {word: find_pass(word) for word in dict.fromkeys(word for word, _ in specs)}
    found = [build(classes[word], dict(options), patterns) for word, options in specs]
    return found[0] if len(found) == 1 else Pipeline(found)


def build(cls: type[Pass], options: dict[str, Any], patterns: Mapping[str, Pattern] = MappingProxyType({})) -> Pass:
    """Return a pass from its options, which may be text or values of a TOML file.

    Args:
        cls: the pass.
        options: its options.
        patterns: the patterns that selectors may refer to by name.

    Raises:
        RecipeError: an option is unknown or has a value of the wrong kind.
    """
    fields = dataclasses.fields(cls)
    known = {one.name: hints(cls)[one.name] for one in fields}

    def nested(kind: type) -> Callable[[Any], object] | None:
        if not issubclass(kind, Pass):
            return None
        return lambda raw: raw if isinstance(raw, kind) else parse_pass(str(raw), patterns)

    values = convert_options(cls.word, options, known, nested, patterns)
    require_given(cls.word, values, [one.name for one in fields if _is_required(one)])
    return cls(**values)


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


read_passes_with(Pass, parse_pass)
