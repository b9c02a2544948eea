"""Where output goes: results on stdout, progress and errors on stderr."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

OUT = Console()
ERR = Console(stderr=True)


@contextmanager
def working(what: str) -> Iterator[None]:
    """Shows on stderr that `what` goes on, and how long it took once it took over a second."""
    start = time.perf_counter()
    with ERR.status(f"{what} ..."):
        yield
    seconds = time.perf_counter() - start
    if seconds > 1 and ERR.is_terminal:
        ERR.print(f"{what}: {seconds:.1f} s", style="dim", highlight=False)


def hush() -> None:
    """Keeps the libraries' own progress bars and notes off the terminal."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
