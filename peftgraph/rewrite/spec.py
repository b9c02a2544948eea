"""Specs: a pass prints as `lora{at=attention.q|attention.v rank=8 ...}` and the text parses back to an equal pass."""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from peftgraph.errors import PeftGraphError, RecipeError
from peftgraph.rewrite.method import Pass, Pipeline
from peftgraph.rewrite.options import hints
from peftgraph.rewrite.registry import find_pass
from peftgraph.rewrite.spec_text import parse_specs, split_items
from peftgraph.sites import Pattern
from peftgraph.sites.selectors.selector import Selector, as_selector


def parse_pass(text: str, patterns: Mapping[str, Pattern] = MappingProxyType({})) -> Pass:
    """Read a pass from its spec, or a `Pipeline` from several; the inverse of `str(method)`.

    Args:
        text: the specs.
        patterns: the patterns that selectors may refer to by name.

    Raises:
        RecipeError: the text cannot be read.
    """
    if not isinstance(text, str):
        raise RecipeError(f"A spec is text such as lora{{rank=8}}, got {type(text).__name__}.")
    specs = parse_specs(text)
    if not specs:
        raise RecipeError("An empty recipe: expected a spec such as lora{rank=8}.")
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
    known = hints(cls)
    fields = {f.name for f in dataclasses.fields(cls)}
    values: dict[str, Any] = {}
    for key, raw in options.items():
        if key not in fields:
            close = difflib.get_close_matches(key, fields, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise RecipeError(f"{cls.word} has no option {key!r}.{hint} Its options: {', '.join(sorted(fields))}.")
        try:
            values[key] = _convert(raw, known[key], patterns)
        except RecipeError:
            raise
        except (PeftGraphError, ValueError, TypeError) as error:
            raise RecipeError(f"{cls.word}: option {key!r} cannot be {raw!r}: {error}") from None
    lacking = [f.name for f in dataclasses.fields(cls) if f.name not in values and _is_required(f)]
    if lacking:
        raise RecipeError(f"{cls.word} needs {', '.join(lacking)}=...")
    return cls(**values)


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _convert(raw: Any, hint: Any, patterns: Mapping[str, Pattern]) -> Any:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if types.NoneType in options and raw in ("none", None):
        return None
    kinds = [option for option in options if option is not types.NoneType]
    kind = typing.get_origin(kinds[0]) or kinds[0]
    if kind is tuple:
        return _convert_tuple(raw, typing.get_args(kinds[0])[0], patterns)
    if kind is Selector or (isinstance(kind, type) and issubclass(kind, Selector)):
        return as_selector(json.loads(raw) if isinstance(raw, str) and raw.startswith('"') else raw, patterns)
    if isinstance(kind, type) and issubclass(kind, Pass):
        return raw if isinstance(raw, kind) else parse_pass(str(raw), patterns)
    return _convert_scalar(raw, kind)


def _convert_scalar(raw: Any, kind: Any) -> Any:
    if typing.get_origin(kind) is None and kind not in (bool, int, float, str):
        kind = str  # a Literal: the pass checks its words itself
    if isinstance(raw, str) and raw.startswith('"'):
        raw = json.loads(raw)
    if kind is bool:
        if isinstance(raw, bool) or raw in ("true", "false"):
            return raw in (True, "true")
        raise ValueError("expected true or false")
    if kind is str and not isinstance(raw, str):
        raise ValueError("expected text")
    if kind in (int, float) and (isinstance(raw, bool) or (kind is int and isinstance(raw, float))):
        raise ValueError(f"expected {'a whole number' if kind is int else 'a number'}")
    return kind(raw)


def _convert_tuple(raw: Any, kind: Any, patterns: Mapping[str, Pattern]) -> tuple[Any, ...]:
    if isinstance(raw, str):
        if not (raw.startswith("[") and raw.endswith("]")):
            raise ValueError("expected a list [..., ...]")
        raw = [item for item in split_items(raw[1:-1]) if item]
    return tuple(_convert(item, kind, patterns) for item in raw)
