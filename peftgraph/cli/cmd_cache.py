"""`peftgraph cache`: shows the folder in which earlier traces are kept, or empties it."""

from __future__ import annotations

from typing import Annotated

import typer

from peftgraph.terminal.console import OUT
from peftgraph.utils.cache_folder import LARGEST, cache_folder, cached_files, clear


def cache(
    empty: Annotated[bool, typer.Option("--clear", help="Remove every trace that is kept.")] = False,
) -> None:
    """Show where earlier traces are kept, and how large they are; $PEFTGRAPH_CACHE is another folder for them."""
    folder = cache_folder()
    if empty:
        count, size = clear(folder)
        OUT.print(
            f"{folder}: {count} traces removed, {size / 1e6:.1f} MB", highlight=False, markup=False, soft_wrap=True
        )
        return
    files = cached_files(folder)
    size = sum(state.st_size for _, state in files)
    OUT.print(
        f"{folder}: {len(files)} traces, {size / 1e6:.1f} MB of at most {LARGEST / 1e6:.0f} MB; --clear removes them",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
