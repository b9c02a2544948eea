"""The merge of `peftgraph merge --by-shard`: from folder to folder, resumable."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from peftgraph.cli.console import OUT, report, working
from peftgraph.cli.files import check_target, check_unchanged, copy_companions, stamps
from peftgraph.cli.unfinished import is_finished, unfinished_folder, work_folder
from peftgraph.errors import PeftGraphError
from peftgraph.interop.checkpoints.checkpoint import INDEX, SINGLE, Checkpoint
from peftgraph.interop.checkpoints.updates import Updates
from peftgraph.interop.checkpoints.write import check_space, identity, write_shards
from peftgraph.interop.formats import is_peft
from peftgraph.interop.native import read_document


def is_default(source: Path, adapter: Path) -> bool:
    """Whether a model is merged by shard unless told otherwise: it has several, or the adapter is peft's."""
    return is_peft(adapter) or ((source / INDEX).is_file() and not (source / SINGLE).is_file())


def merge(source: Path, adapter: Path, out: Path, force: bool) -> None:
    """Writes the merged model; everything that can be refused is refused before anything is written."""
    reads = (source, adapter)
    if not work_folder(out).exists():
        check_target(out, force, reads)
    before = stamps(reads)
    checkpoint = Checkpoint.open(source)
    job = identity(checkpoint, sorted(path for path in before if path.parent == adapter))
    if is_finished(out, job):
        OUT.print("It was merged before, and the process was killed when that was done.")
        report(out, [])
        return
    updates, notes = (_peft if is_peft(adapter) else _own)(source, adapter, checkpoint)
    check_space(checkpoint, out.absolute(), work_folder(out) / "new")
    shards = [file.path.name for file in checkpoint.files]
    with unfinished_folder(out, job, shards, force, reads) as fresh:
        with _bar(checkpoint.size) as wrote:
            kept = write_shards(checkpoint, updates, fresh, wrote)
        copied = copy_companions(source, fresh)
        try:
            check_unchanged(before, reads)
        except PeftGraphError:
            shutil.rmtree(fresh)
            raise
    OUT.print("\n".join(notes), highlight=False, markup=False)
    OUT.print(f"shards    {len(shards)}, {checkpoint.size / 1e9:.2f} GB, {kept} of them kept from before")
    report(out, copied)


def _peft(source: Path, adapter: Path, checkpoint: Checkpoint) -> tuple[Updates, list[str]]:
    """The updates of an adapter of peft, and how many they are."""
    from peftgraph.cli.models import skeleton
    from peftgraph.interop.checkpoints.peft_updates import peft_updates

    updates = peft_updates(skeleton(source, checkpoint.dtype), adapter, checkpoint)
    return updates, [f"changed   {len(updates.changed)} tensors; every other tensor is the base's own"]


def _own(source: Path, adapter: Path, checkpoint: Checkpoint) -> tuple[Updates, list[str]]:
    """The updates of an adapter of this library, and what was proved of them."""
    from peftgraph.cli.models import skeleton, trace
    from peftgraph.interop.checkpoints.folded import folded_updates
    from peftgraph.interop.checkpoints.layout import Layout

    read_document(adapter)  # before the model is traced
    model = skeleton(source, checkpoint.dtype)
    program = trace(model)
    with working("folding, on shapes"):
        updates = folded_updates(program, program.sites, program.apply, adapter, Layout.of(model, checkpoint))
    return updates, [str(updates.plan.proof)]


@contextmanager
def _bar(total: int) -> Iterator[Callable[[int], None]]:
    """Shows the bytes written on stderr, where that is a terminal."""
    console = Console(file=sys.stderr)
    columns = (TextColumn("merging"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("merging", total=total)
        yield lambda count: progress.advance(task, count)
