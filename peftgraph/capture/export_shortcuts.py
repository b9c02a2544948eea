"""What torch's exporter records of every node is recorded in a cheaper way, or left out where nothing reads it."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import CodeType, FrameType
from unittest.mock import patch

from torch.fx import proxy
from torch.fx.experimental import proxy_tensor


class _Stack:
    """Has the interface of torch's CapturedTraceback, which reads every line of every frame anew."""

    def __init__(self, frame: FrameType | None) -> None:
        self._frames: list[traceback.FrameSummary] = []
        while frame is not None:
            self._frames.append(_summary(frame.f_code, frame.f_lineno))
            frame = frame.f_back

    @classmethod
    def extract(cls) -> _Stack:
        """Return the stack of the caller."""
        return cls(sys._getframe(1))

    def summary(self) -> list[traceback.FrameSummary]:
        """Return the frames, the outermost first."""
        return self._frames[::-1]


def _summary(code: CodeType, line: int) -> traceback.FrameSummary:
    """Return the summary of a place, one object for each; a code's own hash reads all of its content."""
    known = _SUMMARIES.get((id(code), line))
    if known is None or known[0] is not code:
        summary = traceback.FrameSummary(code.co_filename, line, code.co_name, lookup_line=False)
        known = _SUMMARIES[id(code), line] = (code, summary)
    return known[1]


_SUMMARIES: dict[tuple[int, int], tuple[CodeType, traceback.FrameSummary]] = {}


@contextmanager
def cheap_records() -> Iterator[None]:
    """Let an exporter that runs inside the block record stacks cheaply, and no layouts beside a node's value."""
    with ExitStack() as stack:
        stack.callback(_SUMMARIES.clear)
        if hasattr(proxy, "CapturedTraceback"):
            stack.enter_context(patch.object(proxy, "CapturedTraceback", _Stack))
        if hasattr(proxy_tensor, "_extract_tensor_metadata"):
            stack.enter_context(patch.object(proxy_tensor, "_extract_tensor_metadata", lambda value: None))
        yield
