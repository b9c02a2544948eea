"""A trace that takes long says so while it runs, and what would make it quick."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from peftgraph.capture.example_inputs import Example
from peftgraph.capture.progress import Progress, no_progress

PATIENCE = 60.0  # seconds


@contextmanager
def warn_when_slow(example: Example, progress: Progress) -> Iterator[None]:
    """Notify `progress`, or standard error if there is none, once the block has taken PATIENCE seconds. Another thread
    does so, since this one may be inside one algebraic step for minutes."""
    stream, words = sys.stderr, _proposal(example)

    def tell() -> None:
        if progress is no_progress:
            print(f"peftgraph: {words}", file=stream, flush=True)
        else:
            progress(words, 0, 0)

    timer = threading.Timer(PATIENCE, tell)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _proposal(example: Example) -> str:
    """Propose what to fix: the axes after the channels of images and volumes, otherwise the axes after the batch."""
    tensors = [leaf for leaf in example.leaves if isinstance(leaf.value, Tensor) and leaf.value.dim() > 1]
    pictures = [leaf for leaf in tensors if leaf.value.dim() > 3 and leaf.value.is_floating_point()]
    fixed = {leaf.key: tuple(range(2, leaf.value.dim())) for leaf in pictures} or {
        leaf.key: tuple(range(1, leaf.value.dim())) for leaf in tensors
    }
    return (
        f"exporting in symbolic sizes has taken {PATIENCE:.0f} s so far; sizes that are always the same for you need "
        f"no algebra: pg.trace(model, example, fixed={fixed})"
    )
