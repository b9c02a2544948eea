"""Writes a folder that takes long to fill: finished files survive an interruption, and the whole appears at the end.

While the work goes on, DIR.unfinished is beside DIR, with `job.json`, which identifies the work, and `new`, which
becomes DIR. One process at a time works there.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from peftgraph.errors import PeftGraphError
from peftgraph.model_folders.output_folder import check_target, made_of, note_made
from peftgraph.utils.atomic_files import (
    MARK,
    SAVED,
    atomic_file,
    folder_lock,
    read_regular_file,
    remove_leftovers,
    swap_folder,
)

JOB = "job.json"


@contextmanager
def resumable_folder(
    target: Path, job: str, keep: Iterable[str], force: bool = False, reads: Iterable[Path] = ()
) -> Iterator[Path]:
    """Yield a folder that becomes `target` when the block succeeds, and is kept for the next try when it fails.

    Args:
        target: the folder to make.
        job: identifies what it is made from.
        keep: the files that are kept from an interrupted try at the same job; all others are removed.
        force: replace `target` if it is not empty.
        reads: folders that are read meanwhile, which are never replaced.

    Raises:
        PeftGraphError: `target` holds something and `force` is off, another folder is in the way, another process is
            writing it, or it cannot be written.
    """
    work = work_folder(target)
    new, old = work / "new", work / SAVED
    try:
        _check_work(work)
        remove_leftovers(work.parent)
        with folder_lock(work, f"merging into {target}", 0.0):
            try:
                if old.exists() and not target.exists():  # killed while the new folder took the place of the old one
                    old.replace(target)
                check_target(target, force, reads)
                _start(work, job)
                _clear(new, set() if made_of(target) == job else set(keep))  # else it may be what was replaced
                yield new
                note_made(new, job)
                check_target(target, force, reads)
                swap_folder(new, target.absolute(), old, force)
                remove(work)
            finally:
                with contextlib.suppress(OSError):
                    work.rmdir()  # where nothing was begun
    except OSError as error:
        raise PeftGraphError(
            f"{target} cannot be written: {error.strerror or error}. What is finished is kept in {work}."
        ) from error


def work_folder(target: Path) -> Path:
    """Return the folder that the output for `target` is prepared in."""
    target = target.absolute()
    return target.parent / f"{target.name}.unfinished"


def is_finished(target: Path, job: str) -> bool:
    """Check whether a job was completed by a process that was killed before it cleaned up; if so, clean up."""
    work = work_folder(target)
    if not (work.exists() or _trash(work).exists()) or made_of(target) != job:
        return False
    _check_work(work)
    with folder_lock(work, f"merging into {target}", 0.0):
        remove(work)
    return True


def remove(work: Path) -> None:
    """Remove a work folder; it is renamed first, so that no reader finds a partial one."""
    trash = _trash(work)
    shutil.rmtree(trash, ignore_errors=True)
    with contextlib.suppress(OSError):
        work.replace(trash)
        shutil.rmtree(trash, ignore_errors=True)


def _trash(work: Path) -> Path:
    return work.with_name(f".{work.name}{MARK}removed")


def _check_work(work: Path) -> None:
    """Check that a folder of the work folder's name was made by this command, or holds nothing but temporary files.

    Raises:
        PeftGraphError: it was not, and does.
    """
    if work.exists() and _job_of(work) is None and not _is_unused(work):
        raise PeftGraphError(
            f"{work} is in the way, and this command did not make it. Move it or choose another folder."
        )


def _is_unused(work: Path) -> bool:
    return work.is_dir() and all(path.name.startswith(".") for path in work.iterdir())


def _job_of(work: Path) -> str | None:
    """Return the job of a work folder; None where it names none."""
    try:
        found = json.loads(read_regular_file(work / JOB))["job"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return found if isinstance(found, str) else None


def _start(work: Path, job: str) -> None:
    """Assign a work folder to a job; remove what another job left in it."""
    shutil.rmtree(work / SAVED, ignore_errors=True)
    if _job_of(work) == job:
        return
    for path in work.iterdir():
        shutil.rmtree(path, ignore_errors=True)
    with atomic_file(work / JOB) as temporary:
        temporary.write_text(json.dumps({"job": job}), encoding="utf-8")


def _clear(folder: Path, keep: set[str]) -> None:
    """Remove everything from a folder but the files to keep; make it where it is missing."""
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in keep:
            path.unlink()
