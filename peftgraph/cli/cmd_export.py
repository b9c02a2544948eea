"""`peftgraph export`: a model, with an adapter or without, as a file that runs without peftgraph."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peftgraph.cli.cmd_inspect import Source
from peftgraph.cli.console import OUT, working


def export(
    source: Source,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The suffix says the format: .pt2 or .onnx.")],
    adapter: Annotated[
        Path | None, typer.Option("--adapter", metavar="DIR", help="Merge this adapter on the way.")
    ] = None,
) -> None:
    """Writes the graph as .pt2 (torch.export) or .onnx. What of an adapter cannot be folded stays in the graph."""
    import peftgraph as pg
    from peftgraph.cli.models import load, trace

    if out.suffix not in (".pt2", ".onnx"):
        raise pg.ExportError(f"{out}: the suffix says the format; known are .pt2, .onnx.")
    program = trace(load(source))
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
