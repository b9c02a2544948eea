"""`peftgraph export`: writes a model, with or without an adapter, as a file that runs without peftgraph."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peftgraph.cli.caching import caching
from peftgraph.cli.cmd_inspect import Source
from peftgraph.interop.adapter_folder import check_exists
from peftgraph.model_folders.loading import check_source, load, trace
from peftgraph.runtime.export.registry import check_suffix, find_exporter, suffixes
from peftgraph.terminal.console import OUT, working


def export(
    ctx: typer.Context,
    source: Source,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help=f"The suffix says the format: {suffixes()}.")],
    adapter: Annotated[
        Path | None, typer.Option("--adapter", metavar="DIR", help="Merge this adapter on the way.")
    ] = None,
) -> None:
    """Write the graph as a file. Edits of an adapter that cannot be folded stay in the graph."""
    check_suffix(out)
    check_source(source, weights=True)
    if adapter is not None:
        check_exists(adapter)
    import peftgraph as pg

    find_exporter(out)  # before the model is traced
    program = trace(load(source), cache=caching(ctx))
    if adapter is not None:
        with working("folding, with proof"):
            program = pg.fold(program.load_adapter(adapter), partial=True)
        OUT.print(str(program.proof), highlight=False, markup=False)
    with working(f"exporting {out.name}"):
        path = program.export(out)
    OUT.print(
        f"{path}: {path.stat().st_size / 1e6:.1f} MB, inputs {program.signature.describe()}",
        highlight=False,
        markup=False,
    )
