"""`peftgraph cache`: shows the folder in which earlier traces are kept, or empties it."""

from __future__ import annotations

from typing import Annotated

import typer

from peftgraph.cli.options import Json
from peftgraph.terminal.console import emit, say
from peftgraph.utils.cache_folder import LARGEST, cache_folder, cached_files, clear


def cache(
    empty: Annotated[bool, typer.Option("--clear", help="Remove every trace that is kept.")] = False,
    as_json: Json = False,
) -> None:
    """Show where earlier traces are kept, and how large they are; $PEFTGRAPH_CACHE is another folder for them."""
    folder = cache_folder()
    if empty:
        count, size = clear(folder)
        text = f"{folder}: {count} traces removed, {size / 1e6:.1f} MB"
    else:
        files = cached_files(folder)
        count, size = len(files), sum(state.st_size for _, state in files)
        most = f"of at most {LARGEST / 1e6:.0f} MB; --clear removes them"
        text = f"{folder}: {count} traces, {size / 1e6:.1f} MB {most}"
    if as_json:
        emit({"folder": str(folder), "traces": count, "bytes": size, "most_bytes": LARGEST, "removed": empty})
    else:
        say(text)
