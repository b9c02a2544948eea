"""Prints results to stdout, progress and errors to stderr.

In a pipe nothing is wrapped: a line of a program that reads it is a line that was printed. Texts are printed as they
are, whatever brackets and colons they contain.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions
from rich.markup import escape

from peftgraph.utils.terminal_line import shown_elsewhere

WIDE = 100_000  # columns of what is no terminal


class Plain(Console):
    """Prints texts and tables without markup, as wide as they are where the stream is no terminal."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, highlight=False, emoji=False, **options)

    @property
    def options(self) -> ConsoleOptions:
        """Those of the terminal; WIDE where there is none."""
        found = super().options
        return found if self.is_terminal else found.update(width=WIDE)

    def print(self, *objects: Any, **options: Any) -> None:
        """Print; what is no terminal gets whole lines."""
        super().print(*objects, **({} if self.is_terminal else {"crop": False}), **options)


OUT = Console()  # with markup, for the pages of the quickstart
ERR = Plain(stderr=True)
RESULT = Plain()


def say(text: str, style: str | None = None) -> None:
    """Print a result; only a terminal wraps it."""
    RESULT.print(text, style=style, soft_wrap=True)


def emit(document: object) -> None:
    """Print JSON, for --json: the result of a command, and nothing else."""
    print(json.dumps(document, indent=1, default=str))


@contextmanager
def working(what: str) -> Iterator[Callable[[str, int, int], None]]:
    """Show on stderr that `what` is running, and its duration if over a second.

    Yields a function that shows a phase, the number of its steps that have begun, and their total (0 for unknown).
    """
    start = time.perf_counter()
    before = shown_elsewhere.set(True)
    try:
        # The stream of this moment, since tracing silences whatever writes to sys.stderr later.
        with Console(file=sys.stderr).status(escape(f"{what} ...")) as status:

            def show(phase: str, begun: int, total: int) -> None:
                steps = f", layer {begun} of {total}" if begun else ""
                status.update(escape(f"{what}: {phase}{steps} ..."))

            yield show
    finally:
        shown_elsewhere.reset(before)
    seconds = time.perf_counter() - start
    if seconds > 1 and ERR.is_terminal:
        ERR.print(f"{what}: {seconds:.1f} s", style="dim")


def report(out: Path, copied: list[str]) -> None:
    """Print where a merged model was written, and what was copied with it."""
    beside = f", with {', '.join(copied)}" if copied else ""
    say(f"merged model written to {out}{beside}", "bold")


def hush() -> None:
    """Silence the progress bars and notes of other libraries."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
