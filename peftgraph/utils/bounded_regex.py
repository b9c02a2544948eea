"""Regular expressions that others wrote, in bounded time.

Python's own engine can take longer than anybody waits for a pattern such as (a+)+b, and cannot be interrupted. The
engine of the package `regex` reads the same language and stops when it is told to.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from functools import lru_cache

import regex

from peftgraph.errors import PeftGraphError

LENGTH = 100_000  # characters of a pattern: the paths of a large model, one by one
SLOW = 0.01  # seconds of one match that count; others take a thousandth of it
BUDGET = 1.0  # seconds that the slow matches of one pattern may take together
DEPTH = 100  # brackets within one another


class BoundedRegex:
    """A regular expression.

    Args:
        pattern: its text.

    Raises:
        PeftGraphError: it is none, or too long.
    """

    def __init__(self, pattern: str) -> None:
        self._left = BUDGET
        self._pattern = pattern
        if not isinstance(pattern, str):
            raise PeftGraphError(f"a regular expression is text, not {type(pattern).__name__}")
        if len(pattern) > LENGTH or _depth(pattern) > DEPTH:
            raise PeftGraphError("a regular expression of that length, or with that many brackets, is not read")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # what may mean something else one day is ambiguous today
                self._compiled = regex.compile(pattern)
        except (regex.error, Warning, OverflowError, RecursionError, MemoryError, ValueError) as problem:
            raise PeftGraphError(f"{_short(pattern)} is no regular expression: {problem}") from None

    def fullmatch(self, text: str) -> bool:
        """Tell whether the expression matches the whole text.

        Raises:
            PeftGraphError: it takes too long to say.
        """
        return self._bounded(self._compiled.fullmatch, text) is not None

    def match(self, text: str) -> regex.Match[str] | None:
        """Match at the start of the text.

        Raises:
            PeftGraphError: it takes too long to say.
        """
        return self._bounded(self._compiled.match, text)

    def _bounded(self, how: Callable[..., regex.Match[str] | None], text: str) -> regex.Match[str] | None:
        start = time.perf_counter()
        try:
            found = how(text, timeout=max(self._left, 1e-3))
        except TimeoutError:
            self._left = 0.0
            raise PeftGraphError(
                f"The regular expression {_short(self._pattern)} takes longer than {BUDGET:g} s, at {_short(text)}: "
                "it has repetitions within repetitions, or many in a row. Write what they repeat once, or a list."
            ) from None
        spent = time.perf_counter() - start
        self._left -= spent if spent > SLOW else 0.0
        return found


@lru_cache(maxsize=1024)
def compile_bounded(pattern: str) -> BoundedRegex:
    """Compile a regular expression; its matches share one budget of time.

    Raises:
        PeftGraphError: the text is no regular expression.
    """
    return BoundedRegex(pattern)


def _depth(pattern: str) -> int:
    depth = deepest = 0
    for letter in pattern:
        depth += (letter in "([") - (letter in ")]")
        deepest = max(deepest, depth)
    return deepest


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:77]}...")
