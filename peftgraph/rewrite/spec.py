"""Specs: a pass prints as `lora{at=attention.q|attention.v rank=8 ...}` and the text parses back to an equal pass."""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from peftgraph.errors import PeftGraphError, RecipeError, pointed, shortened
from peftgraph.sites.selectors.selector import Selector, as_selector

if TYPE_CHECKING:
    from peftgraph.rewrite.method import Pass
    from peftgraph.sites import Pattern


def print_value(value: Any) -> str:
    """One value of a spec."""
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "none"}[value]
    if isinstance(value, tuple | list):
        return f"[{', '.join(print_value(item) for item in value)}]"
    return repr(value) if isinstance(value, int | float) else str(value)


def parse_specs(text: str) -> list[tuple[str, dict[str, str]]]:
    """The passes of a text as (word, options as text); the specs stand one after the other, by spaces, commas or lines.

    Raises:
        RecipeError: the text is no list of specs; the message shows the place.
    """
    found: list[tuple[str, dict[str, str]]] = []
    position = _skip(text, 0)
    while position < len(text):
        word, position = _word(text, position)
        if position >= len(text) or text[position] != "{":
            raise _error(text, position, f"expected '{{' after {word!r}")
        body, position = _balanced(text, position)
        if len(found) == PASSES:
            raise _error(text, position, f"more than {PASSES} passes")
        found.append((word, dict(_options(text, body, position - len(body) - 1))))
        position = _skip(text, position)
    return found


def build(cls: type[Pass], options: dict[str, Any], patterns: Mapping[str, Pattern] = MappingProxyType({})) -> Pass:
    """A pass from its options, which may be text or values of a TOML file.

    Args:
        cls: the pass.
        options: its options.
        patterns: the patterns that selectors may call by name.

    Raises:
        RecipeError: an option is unknown or has a value of the wrong kind.
    """
    hints = typing.get_type_hints(cls)
    fields = {f.name for f in dataclasses.fields(cls)}
    values: dict[str, Any] = {}
    for key, raw in options.items():
        if key not in fields:
            close = difflib.get_close_matches(key, fields, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise RecipeError(f"{cls.word} has no option {key!r}.{hint} Its options: {', '.join(sorted(fields))}.")
        try:
            values[key] = _convert(raw, hints[key], patterns)
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
    if hasattr(kind, "word"):
        return raw if isinstance(raw, kind) else _one(str(raw), patterns)
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
        raw = [item for item in _split(raw[1:-1]) if item]
    return tuple(_convert(item, kind, patterns) for item in raw)


def _one(text: str, patterns: Mapping[str, Pattern]) -> Pass:
    from peftgraph.rewrite.method import parse_pass

    return parse_pass(text, patterns)


# the scanner: words, balanced brackets, quoted strings

PAIRS = {"{": "}", "(": ")", "[": "]"}
PASSES = 256  # of a text
DEPTH = 64  # brackets within brackets


def _skip(text: str, position: int) -> int:
    while position < len(text) and (text[position].isspace() or text[position] in ",;"):
        position += 1
    return position


def _word(text: str, position: int) -> tuple[str, int]:
    start = position
    while position < len(text) and (text[position].isalnum() or text[position] == "_"):
        position += 1
    if start == position:
        raise _error(text, position, "expected the name of a pass")
    return text[start:position], position


def _balanced(text: str, position: int) -> tuple[str, int]:
    """The text inside the bracket that opens at `position`, and the position after its closing one."""
    start, closing = position, [PAIRS[text[position]]]
    position += 1
    while closing:
        if position >= len(text):
            raise _error(text, start, f"no closing {closing[-1]!r}")
        char = text[position]
        if char == '"':
            position = _end_of_string(text, position)
            continue
        if char in PAIRS:
            closing.append(PAIRS[char])
            if len(closing) > DEPTH:
                raise _error(text, position, f"more than {DEPTH} brackets within one another")
        elif char in PAIRS.values() and closing.pop() != char:
            raise _error(text, position, f"unexpected {char!r}")
        position += 1
    return text[start + 1 : position - 1], position


def _end_of_string(text: str, position: int) -> int:
    start = position
    position += 1
    while position < len(text) and text[position] != '"':
        position += 2 if text[position] == "\\" else 1
    if position >= len(text):
        raise _error(text, start, "no closing quote")
    return position + 1


def _split(body: str) -> Iterator[str]:
    """The items of a body, at spaces and commas outside of brackets and strings."""
    start = position = _skip(body, 0)
    while position < len(body):
        char = body[position]
        if char.isspace() or char in ",;":
            yield body[start:position]
            start = position = _skip(body, position)
        elif char == '"':
            position = _end_of_string(body, position)
        elif char in PAIRS:
            position = _balanced(body, position)[1]
        else:
            position += 1
    if start < len(body):
        yield body[start:]


def _options(text: str, body: str, offset: int) -> Iterator[tuple[str, str]]:
    for item in _split(body):
        key, equals, value = item.partition("=")
        if not equals or not key.isidentifier() or not value:
            raise _error(text, offset + body.find(item), f"expected key=value, found {item!r}")
        yield key, value


def _error(text: str, position: int, what: str) -> RecipeError:
    return RecipeError(f"{shortened(what)}:\n{pointed(text, position)}")
