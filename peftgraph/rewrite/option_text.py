"""The options of a pass from their text, or from the values of a TOML file, by their types; nothing here needs the pass
itself, so that a mistake is found before it is loaded."""

from __future__ import annotations

import difflib
import json
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from peftgraph.errors import PeftGraphError, RecipeError
from peftgraph.rewrite.peft_options import counterpart
from peftgraph.rewrite.spec_text import split_items
from peftgraph.sites.patterns.pattern import Pattern
from peftgraph.sites.selector_parser import as_selector
from peftgraph.sites.selectors.selector import Selector

# For the class of an option: what reads a pass within a pass, None for any other class.
Nested = Callable[[type], Callable[[Any], object] | None]


def convert_options(
    word: str, options: Mapping[str, Any], known: Mapping[str, Any], nested: Nested, patterns: Mapping[str, Pattern]
) -> dict[str, Any]:
    """Return the values of the options that are given.

    Args:
        word: of the pass.
        options: as text, or as values of a TOML file.
        known: the types of all options.
        nested: what reads passes within passes.
        patterns: the patterns that selectors may refer to by name.

    Raises:
        RecipeError: an option is unknown or has a value of the wrong kind.
    """
    values: dict[str, Any] = {}
    for key, raw in options.items():
        if key not in known:
            raise unknown_option(word, key, known)
        try:
            values[key] = _convert(raw, known[key], nested, patterns)
        except RecipeError:
            raise
        except (PeftGraphError, ValueError, TypeError) as error:
            raise RecipeError(f"{word}: option {key!r} cannot be {raw!r}: {error}") from None
    return values


def unknown_option(word: str, key: str, known: Collection[str]) -> RecipeError:
    """Return the error for an option that a pass does not have."""
    hint = counterpart(word, key, known)
    if not hint:
        close = difflib.get_close_matches(key, known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
    return RecipeError(f"{word} has no option {key!r}.{hint} Its options: {', '.join(sorted(known))}.")


def require_given(word: str, given: Mapping[str, Any], required: Sequence[str]) -> None:
    """Refuse a pass without the options that have no default.

    Raises:
        RecipeError: some are missing.
    """
    lacking = [name for name in required if name not in given]
    if lacking:
        raise RecipeError(f"{word} needs {', '.join(lacking)}=...")


def _convert(raw: Any, hint: Any, nested: Nested, patterns: Mapping[str, Pattern]) -> Any:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if types.NoneType in options and raw in ("none", None):
        return None
    kinds = [option for option in options if option is not types.NoneType]
    kind = typing.get_origin(kinds[0]) or kinds[0]
    if kind is tuple:
        return _convert_tuple(raw, typing.get_args(kinds[0])[0], nested, patterns)
    if isinstance(kind, type) and issubclass(kind, Selector):
        return as_selector(_selector_text(raw), patterns)
    read = nested(kind) if isinstance(kind, type) else None
    return _convert_scalar(raw, kind) if read is None else read(raw)


def _selector_text(raw: Any) -> Any:
    """Return the texts of a selector: of a list, all items."""
    if not isinstance(raw, str):
        return raw
    if raw.startswith("[") and raw.endswith("]"):
        return [_selector_text(item) for item in split_items(raw[1:-1])]
    return json.loads(raw) if raw.startswith('"') else raw


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


def _convert_tuple(raw: Any, kind: Any, nested: Nested, patterns: Mapping[str, Pattern]) -> tuple[Any, ...]:
    if isinstance(raw, str):
        if not (raw.startswith("[") and raw.endswith("]")):
            raise ValueError("expected a list [..., ...]")
        raw = [item for item in split_items(raw[1:-1]) if item]
    return tuple(_convert(item, kind, nested, patterns) for item in raw)
