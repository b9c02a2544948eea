"""The text of specs: splits `lora{at=attention.q rank=8} ia3{}` into words and options, and prints one option."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from peftgraph.errors import RecipeError, pointed, shortened

PIPELINE = "pipeline"  # the word of several passes, which no other may have


def print_value(value: Any) -> str:
    """Return one value of a spec."""
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "none"}[value]
    if isinstance(value, tuple | list):
        return f"[{', '.join(print_value(item) for item in value)}]"
    return repr(value) if isinstance(value, int | float) else str(value)


def parse_specs(text: str) -> list[tuple[str, dict[str, str]]]:
    """Return the passes of a text as (word, options as text); specs are separated by spaces, commas, semicolons or line
    ends, and a word alone has no options.

    Raises:
        RecipeError: the text is no list of specs; the message shows where.
    """
    found: list[tuple[str, dict[str, str]]] = []
    position = _skip(text, 0)
    while position < len(text):
        word, position = _word(text, position)
        body, position = _body(text, word, position)
        if len(found) == PASSES:
            raise _error(text, position, f"more than {PASSES} passes")
        found.append((word, dict(_options(text, body, position - len(body) - 1))))
        position = _skip(text, position)
    return found


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


def _body(text: str, word: str, position: int) -> tuple[str, int]:
    """Return the text inside the braces behind a word, "" where there are none, and the position after it."""
    if position < len(text) and text[position] == "{":
        return _balanced(text, position)
    if position < len(text) and text[position] == "=":
        raise _error(text, position, f"options stand in braces behind the pass, such as lora{{{word}=...}}")
    if position < len(text) and not (text[position].isspace() or text[position] in ",;"):
        raise _error(text, position, f"expected '{{', ';' or the end after {word!r}")
    return "", position


def _balanced(text: str, position: int) -> tuple[str, int]:
    """Return the text inside the bracket that opens at `position`, and the position after its closing one."""
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


def split_items(body: str) -> Iterator[str]:
    """Yield the items of a body, split at spaces and commas outside brackets and strings."""
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
    for item in split_items(body):
        key, equals, value = item.partition("=")
        if not equals or not key.isidentifier() or not value:
            raise _error(text, offset + body.find(item), f"expected key=value, found {item!r}")
        yield key, value


def _error(text: str, position: int, what: str) -> RecipeError:
    return RecipeError(f"{shortened(what)}:\n{pointed(text, position)}")
