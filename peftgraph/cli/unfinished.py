"""A folder that takes long to fill: what is finished outlives an interruption, and the whole appears at the end.

Beside DIR lies DIR.unfinished while the work goes on, with `job.json`, which says what is being made, and `new`, which
becomes DIR.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from peftgraph.cli.files import check_target
from peftgraph.errors import PeftGraphError
from peftgraph.ir.files import atomic, swap

JOB = "job.json"


@contextmanager
def unfinished_folder(target: Path, job: str, keep: Iterable[str], force: bool = False) -> Iterator[Path]:
    """Gives a folder that becomes `target` when the block succeeds, and stays for the next try when it does not.

    Args:
        target: the folder to make.
        job: what it is made of.
        keep: the files that are kept from an interrupted try at the same job; all others are made anew.
        force: replace `target` if it is not empty.

    Raises:
        PeftGraphError: `target` holds something and `force` is off, something else is in the way, or the disk refuses.
    """
    work = work_folder(target)
    new, old = work / "new", work / "old"
    try:
        if old.exists() and not target.exists():  # killed while the new folder took the place of the old one
            old.replace(target)
        check_target(target, force)
        _start(work, job)
        _clear(new, set(keep))
        yield new
        swap(new, target.absolute(), old)
        shutil.rmtree(work)
    except OSError as error:
        raise PeftGraphError(
            f"{target} cannot be written: {error.strerror or error}. What is finished is kept in {work}."
        ) from error


def work_folder(target: Path) -> Path:
    """Where the work for `target` goes on."""
    target = target.absolute()
    return target.parent / f"{target.name}.unfinished"


def _start(work: Path, job: str) -> None:
    """Makes the folder of a job, unless it is there already; one of another job is emptied."""
    if work.exists() and not (work / JOB).exists() and all(path.name.startswith(".") for path in work.iterdir()):
        shutil.rmtree(work)  # killed before it began
    if work.exists():
        try:
            known = json.loads((work / JOB).read_text(encoding="utf-8"))["job"]
        except (OSError, ValueError, KeyError, TypeError):
            raise PeftGraphError(
                f"{work} is in the way, and this command did not make it. Move it or choose another folder."
            ) from None
        shutil.rmtree(work / "old", ignore_errors=True)
        if known == job:
            return
        shutil.rmtree(work / "new", ignore_errors=True)
    with atomic(work / JOB) as temporary:
        temporary.write_text(json.dumps({"job": job}), encoding="utf-8")


def _clear(folder: Path, keep: set[str]) -> None:
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in keep:
            path.unlink()
