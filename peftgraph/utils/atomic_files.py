"""Files and folders are written under a temporary name and renamed, so that no reader ever sees half of one.

What a killed process leaves behind is found by its name and by the lock that died with it, and removed by the next
writer in the same folder.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from peftgraph.errors import PeftGraphError

try:
    import fcntl
except ImportError:  # Windows: nothing is locked, and nothing that may be in use is removed
    fcntl = None

MARK = ".peftgraph-"  # in the names of folders that hold what is not finished
FRESH, SAVED = "new", "old"  # in such a folder, the one that is made, and the one whose place it takes
UNKNOWN = -1  # in the place of a lock, where the system has none
PATIENCE = 10.0  # seconds that another writer is waited for


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`, with the same suffix; it becomes `path` when the block succeeds.

    Raises:
        PeftGraphError: the file cannot be written (no space, no permission); nothing of it is left, and an old file
            stays as it was.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(path) as folder:
            temporary = folder / path.name
            yield temporary
            for extra in sorted(folder.iterdir()):
                if extra != temporary:  # external data of a large ONNX file goes first: the file itself is the commit
                    sync_to_disk(extra)
                    os.replace(extra, path.parent / extra.name)
            sync_to_disk(temporary)
            os.replace(temporary, path)
    except OSError as error:
        raise PeftGraphError(f"{path} cannot be written: {error.strerror or error}. Nothing was changed.") from error


@contextmanager
def atomic_directory(target: Path, replace: bool = True) -> Iterator[Path]:
    """Yield a temporary folder next to `target`; it becomes `target` when the block succeeds.

    Args:
        target: the folder to make.
        replace: replace an existing folder; otherwise it must be empty or missing.

    Raises:
        PeftGraphError: the folder cannot be written, or an existing one cannot be replaced; it then stays.
    """
    target = target.resolve()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(target) as folder:
            fresh = folder / FRESH
            fresh.mkdir()
            yield fresh
            for path in sorted(fresh.rglob("*")):
                if path.is_file():
                    sync_to_disk(path)
            swap_folder(fresh, target, folder / SAVED, replace)
    except OSError as error:
        raise PeftGraphError(f"{target} cannot be written: {error.strerror or error}. Nothing was changed.") from error


@contextmanager
def temporary_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder next to `target`, which is removed at the end; failing to remove it is no error. Folders
    that killed processes left are removed first."""
    remove_leftovers(target.parent)
    folder, lock = _own_folder(target)
    try:
        yield folder
    finally:
        try:
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            _unlock(lock)


def remove_leftovers(parent: Path) -> None:
    """Remove what killed writers left in a folder; restore an old folder that was moved aside and not yet replaced."""
    for path in sorted(parent.glob(f".*{MARK}*")):
        lock = _lock(path) if path.is_dir() and not path.is_symlink() else None
        if lock in (None, UNKNOWN):
            continue  # its writer lives, or may
        try:
            with contextlib.suppress(OSError):
                target = parent / path.name[1:].rpartition(MARK)[0]
                if (path / SAVED).exists() and (path / FRESH).exists() and not target.exists():
                    os.replace(path / SAVED, target)
                shutil.rmtree(path, ignore_errors=True)
        finally:
            _unlock(lock)


def swap_folder(fresh: Path, target: Path, old: Path, replace: bool) -> None:
    """Replace a folder by another, in one step where the system can; otherwise restore the old one if it fails.

    Args:
        fresh: the folder.
        target: its place.
        old: where the other one may go meanwhile, or stay.
        replace: whether a folder that is not empty may be replaced.

    Raises:
        OSError: the folder cannot be moved, or the other one cannot be replaced.
    """
    if not replace or not target.exists():
        os.replace(fresh, target)  # an empty folder gives way, a full one does not
    elif not _exchange(fresh, target):
        os.replace(target, old)
        try:
            os.replace(fresh, target)
        except OSError:
            os.replace(old, target)
            raise
    with contextlib.suppress(OSError):
        sync_to_disk(target.parent)


@contextmanager
def folder_lock(folder: Path, what: str, patience: float = PATIENCE) -> Iterator[None]:
    """Lock a folder against other processes that use the same lock; the folder is made if it is missing.

    Args:
        folder: the folder.
        what: what another process is doing there, for the message.
        patience: seconds to wait for it.

    Raises:
        OSError: the folder cannot be made.
        PeftGraphError: another process has the lock.
    """
    deadline = time.monotonic() + patience
    folder.mkdir(parents=True, exist_ok=True)
    while (lock := _lock(folder)) is None:
        if time.monotonic() > deadline:
            raise PeftGraphError(f"Another process is {what}. Wait until it is done, or choose another folder.")
        time.sleep(0.02)
        folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        _unlock(lock)


def sync_to_disk(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_regular_file(path: Path) -> bytes:
    """Return the content of a regular file; pipes and devices are refused, since they could block or never end.

    Raises:
        OSError: it is not a regular file, is missing, or cannot be read.
        ValueError: the path itself is impossible.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with os.fdopen(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file")
        return file.read()


def _own_folder(target: Path) -> tuple[Path, int]:
    """Return a new folder next to `target` that no other process removes, and its lock."""
    while True:
        folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}{MARK}"))
        lock = _lock(folder)
        if lock is not None:  # else it was taken for litter before it was locked
            return folder, lock


def _lock(folder: Path) -> int | None:
    """Acquire the lock of a folder, which is released when the process ends; None where another process has it or
    removed the folder, and UNKNOWN where the system has no locks."""
    if fcntl is None:
        return UNKNOWN
    try:
        handle = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(handle), os.stat(folder)):
            return handle
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES, errno.ENOENT):
            os.close(handle)
            return UNKNOWN
    os.close(handle)
    return None


def _unlock(lock: int) -> None:
    if lock != UNKNOWN:
        os.close(lock)


def _exchange(a: Path, b: Path) -> bool:
    """Exchange the names of two folders in one step; return False where the system cannot.

    Raises:
        OSError: it has, and the disk refuses.
    """
    library = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None
    if sys.platform == "darwin" and hasattr(library, "renamex_np"):
        failed = library.renamex_np(os.fsencode(a), os.fsencode(b), 2)  # pyright: ignore[reportOptionalMemberAccess]
    elif library is not None and hasattr(library, "renameat2"):
        failed = library.renameat2(-100, os.fsencode(a), -100, os.fsencode(b), 2)  # from here, RENAME_EXCHANGE
    else:
        return False
    if failed and ctypes.get_errno() not in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return not failed
