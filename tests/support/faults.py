"""Disks that fill up and processes that are killed, at every step that a writer takes.

A step is a call by which something on the disk changes. `steps` counts those of a run; `failing` lets one of them, and
all after it where the disk is full, fail; `killed` ends the run at one of them: nothing that it does afterwards, in its
own clean-up, has an effect.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from peftgraph.utils import atomic_files


class Killed(BaseException):
    """What the process does not survive."""


class Steps:
    """The steps of a run: `before(number)` is called before each, and may raise."""

    def __init__(self, before: Callable[[int], None]) -> None:
        self.count = 0
        self.before = before

    def step(self, half: Callable[[], Any] | None = None) -> None:
        """One step begins; a write that does not get through leaves half of it."""
        self.count += 1
        try:
            self.before(self.count)
        except BaseException:
            if half is not None:
                half()
            raise


@contextmanager
def watched(before: Callable[[int], None]) -> Iterator[Steps]:
    """Lets steps pass, or not."""
    steps = Steps(before)
    write_bytes, write_text = Path.write_bytes, Path.write_text

    def through(own: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            steps.step()
            return own(*args, **kwargs)

        return call

    def writes(path: Path, content: bytes) -> int:
        steps.step(lambda: write_bytes(path, content[: len(content) // 2]))
        return write_bytes(path, content)

    def writes_text(path: Path, content: str, **options: Any) -> int:
        steps.step(lambda: write_text(path, content[: len(content) // 2], **options))
        return write_text(path, content, **options)

    def removes(path: Path, ignore_errors: bool = False, **options: Any) -> None:
        try:
            steps.step()
        except OSError:
            if not ignore_errors:
                raise
            return
        rmtree(path, ignore_errors, **options)

    rmtree = shutil.rmtree
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((os, "replace"), (os, "mkdir"), (os, "fsync"), (os, "unlink"), (atomic_files, "_exchange")):
            patch.setattr(owner, name, through(getattr(owner, name)))
        patch.setattr(Path, "write_bytes", writes)
        patch.setattr(Path, "write_text", writes_text)
        patch.setattr(shutil, "rmtree", removes)
        yield steps


def steps(run: Callable[[], Any]) -> int:
    """How many steps a run takes."""
    with watched(lambda number: None) as found:
        run()
    return found.count


@contextmanager
def failing(at: int, full: bool) -> Iterator[None]:
    """The step of that number fails, and where the disk is full every later one."""

    def before(number: int) -> None:
        if number == at or (full and number > at):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with watched(before):
        yield


def killed(at: int, run: Callable[[], Any]) -> None:
    """A run that is killed before the step of that number."""

    def before(number: int) -> None:
        if number >= at:
            raise Killed

    with watched(before), pytest.raises(Killed):
        run()
