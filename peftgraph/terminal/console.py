"""Prints results to stdout, progress and errors to stderr."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

OUT = Console()
ERR = Console(stderr=True)


@contextmanager
def working(what: str) -> Iterator[Callable[[str, int, int], None]]:
    """Show on stderr that `what` is running, and its duration if over a second.

    Yields a function that shows a phase, the number of its steps that have begun, and their total (0 for unknown).
    """
    start = time.perf_counter()
    # The stream of this moment, since tracing silences whatever writes to sys.stderr later.
    with Console(file=sys.stderr).status(f"{what} ...") as status:

        def show(phase: str, begun: int, total: int) -> None:
            steps = f", layer {begun} of {total}" if begun else ""
            status.update(f"{what}: {phase}{steps} ...")

        yield show
    seconds = time.perf_counter() - start
    if seconds > 1 and ERR.is_terminal:
        ERR.print(f"{what}: {seconds:.1f} s", style="dim", highlight=False)


def report(out: Path, copied: list[str]) -> None:
    """Print where a merged model was written, and what was copied with it."""
    beside = f", with {', '.join(copied)}" if copied else ""
    OUT.print(f"merged model written to {out}{beside}", style="bold", highlight=False)


def hush() -> None:
    """Silence the progress bars and notes of other libraries."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
