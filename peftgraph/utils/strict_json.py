"""Reads JSON, and refuses what is ambiguous in it."""

from __future__ import annotations

import json
import math
from typing import Any

DIGITS = 20  # of a whole number; sizes and tokens have fewer


def parse_json(text: str) -> Any:
    """Parse a JSON text strictly.

    Raises:
        ValueError: it is not JSON, or ambiguous.
        RecursionError: it is nested too deeply.
    """
    return json.loads(
        text, parse_constant=_refused, parse_int=_whole, parse_float=_fraction, object_pairs_hook=_distinct
    )


def _refused(word: str) -> None:
    raise ValueError(f"{word} is no JSON number")


def _whole(digits: str) -> int:
    if len(digits) > DIGITS:
        raise ValueError(f"a number has {len(digits)} digits")
    return int(digits)


def _fraction(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:DIGITS]} is larger than any number here")
    return value


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next((key for key in found if keys.count(key) > 1), None)
        raise ValueError(f"the key {twice!r} occurs twice")
    return found
