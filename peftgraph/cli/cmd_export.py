"""`peftgraph export`: writes a model, with or without an adapter, as a file that runs without peftgraph."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peftgraph.cli.caching import caching
from peftgraph.cli.cmd_inspect import Source
from peftgraph.cli.cmd_merge import proof_document
from peftgraph.cli.options import Json
from peftgraph.interop.adapter_folder import check_exists
from peftgraph.model_folders.loading import check_source, load, trace
from peftgraph.runtime.export.registry import check_suffix, find_exporter, suffixes
from peftgraph.terminal.console import emit, say, working


def export(
    ctx: typer.Context,
    source: Source,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help=f"The suffix says the format: {suffixes()}.")],
    adapter: Annotated[
        Path | None, typer.Option("--adapter", metavar="DIR", help="Merge this adapter on the way.")
    ] = None,
    as_json: Json = False,
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
        if not as_json:
            say(str(program.proof))
    with working(f"exporting {out.name}"):
        path = program.export(out)
    size = path.stat().st_size
    if as_json:
        inputs = program.signature.inputs
        emit(
            {
                "file": str(path),
                "bytes": size,
                "inputs": [{"name": one.name, "dtype": str(one.dtype), "dims": list(one.dims)} for one in inputs],
                "left": [str(applied.method) for applied in program.history],
                "proof": proof_document(program.proof),
            }
        )
    else:
        say(f"{path}: {size / 1e6:.1f} MB, inputs {program.signature.describe()}")
