"""Merges an adapter into a model shard by shard, from folder to folder; an interrupted merge can be resumed."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from peftgraph.cli.resumable_folder import is_finished, resumable_folder, work_folder
from peftgraph.errors import PeftGraphError
from peftgraph.interop.adapter_formats import AdapterFormat, find_format
from peftgraph.interop.checkpoints.checkpoint import INDEX, SINGLE, Checkpoint
from peftgraph.interop.checkpoints.shard_writer import check_space, identity, write_shards
from peftgraph.interop.checkpoints.updates import Updates
from peftgraph.interop.native import read_document
from peftgraph.model_folders.output_folder import check_target, check_unchanged, copy_companions, stamps
from peftgraph.terminal.console import report, say, working


def is_default(source: Path, adapter: Path) -> bool:
    """Check whether a model is merged shard by shard by default.

    It is if the adapter's format needs no trace, or if the model has several shards and the format supports it.
    """
    format = find_format(adapter)
    if format is not None:
        return format.checkpoint_updates is not None
    return (source / INDEX).is_file() and not (source / SINGLE).is_file()


def merge(source: Path, adapter: Path, out: Path, force: bool, quiet: bool = False) -> dict[str, Any]:
    """Write the merged model; everything that can be checked is checked before anything is written.

    Returns what was done, for --json; it is printed unless `quiet` is set.
    """
    reads = (source, adapter)
    if not work_folder(out).exists():
        check_target(out, force, reads)
    before = stamps(reads)
    checkpoint = Checkpoint.open(source)
    job = identity(checkpoint, sorted(path for path in before if path.parent == adapter))
    if is_finished(out, job):
        if not quiet:
            say("It was merged before, and the process was killed when that was done.")
            report(out, [])
        return {"by_shard": True, "shards": len(checkpoint.files), "kept_shards": len(checkpoint.files), "copied": []}
    updates = _updates(source, adapter, checkpoint)
    check_space(checkpoint, out.absolute(), work_folder(out) / "new")
    shards = [file.path.name for file in checkpoint.files]
    with resumable_folder(out, job, shards, force, reads) as fresh:
        with _progress_bar(checkpoint.size) as wrote:
            kept = write_shards(checkpoint, updates, fresh, wrote)
        copied = copy_companions(source, fresh)
        try:
            check_unchanged(before, reads)
        except PeftGraphError:
            shutil.rmtree(fresh)
            raise
    if not quiet:
        say(updates.report())
        say(f"shards    {len(shards)}, {checkpoint.size / 1e9:.2f} GB, {kept} of them kept from before")
        report(out, copied)
    shown = {"changed": sorted(updates.changed), "report": updates.report()}
    return {"by_shard": True, "shards": len(shards), "kept_shards": kept, "copied": copied, **shown}


def _updates(source: Path, adapter: Path, checkpoint: Checkpoint) -> Updates:
    """Compute what the adapter changes in the checkpoint.

    Raises:
        PeftGraphError: the adapter's format cannot be merged by shard, or the adapter does not fit.
    """
    format = find_format(adapter)
    if format is None:
        return _own_updates(source, adapter, checkpoint)
    return _foreign_updates(format, source, adapter, checkpoint)


def _foreign_updates(format: AdapterFormat, source: Path, adapter: Path, checkpoint: Checkpoint) -> Updates:
    """Compute what an adapter of another format changes, without tracing the model."""
    from peftgraph.model_folders.loading import skeleton

    if format.checkpoint_updates is None:
        raise PeftGraphError(
            f"{adapter} is an adapter in the format {format.name!r}, which is not merged by shard. Merge it in memory: "
            "--whole."
        )
    return format.checkpoint_updates(skeleton(source, checkpoint.dtype), adapter, checkpoint)


def _own_updates(source: Path, adapter: Path, checkpoint: Checkpoint) -> Updates:
    """Compute what an adapter of this library changes, by its fold on shapes."""
    from peftgraph.interop.checkpoints.folded_updates import folded_updates
    from peftgraph.interop.checkpoints.storage_layout import StorageLayout
    from peftgraph.model_folders.loading import skeleton, trace

    read_document(adapter)  # before the model is traced
    model = skeleton(source, checkpoint.dtype)
    program = trace(model)
    with working("folding, on shapes"):
        layout = StorageLayout.of(model, checkpoint)
        return folded_updates(program, program.sites, program.apply, adapter, layout)


@contextmanager
def _progress_bar(total: int) -> Iterator[Callable[[int], None]]:
    """Show the number of written bytes on stderr, where that is a terminal; yields its update."""
    console = Console(file=sys.stderr)
    columns = (TextColumn("merging"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("merging", total=total)
        yield lambda count: progress.advance(task, count)
