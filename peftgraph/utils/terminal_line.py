"""Says in one line of a terminal what is being done, where nothing else says it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

PATIENCE = 1.0  # seconds before the line appears
CLEAR_REST = "\x1b[K"  # a terminal removes the rest of its line

shown_elsewhere: ContextVar[bool] = ContextVar("shown_elsewhere", default=False)  # by the command line, for one


@contextmanager
def noted_on_terminal(what: str) -> Iterator[None]:
    """Show on standard error that `what` is being done, once it has taken PATIENCE seconds, and remove the line at the
    end; nothing is shown where standard error is no terminal, or while something else shows progress."""
    stream = sys.stderr
    if shown_elsewhere.get() or not stream.isatty():
        yield
        return
    before = shown_elsewhere.set(True)
    written = threading.Event()

    def write() -> None:
        written.set()
        stream.write(f"\r{what} ...{CLEAR_REST}")
        stream.flush()

    timer = threading.Timer(PATIENCE, write)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        shown_elsewhere.reset(before)
        if written.is_set():
            stream.write(f"\r{CLEAR_REST}")
            stream.flush()
