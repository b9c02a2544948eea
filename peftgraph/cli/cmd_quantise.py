"""`peftgraph quantise`: stores the weights of a model as codes of 4 or 8 bits, tensor by tensor."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peftgraph.cli.cmd_inspect import Source
from peftgraph.cli.options import Json
from peftgraph.model_folders.loading import check_source, skeleton, trace
from peftgraph.model_folders.output_folder import atomic_folder, check_target, check_unchanged, copy_companions, stamps
from peftgraph.terminal.console import emit, say, working

if TYPE_CHECKING:
    import peftgraph as pg
    from peftgraph.interop.checkpoints.checkpoint import Checkpoint


def quantise(
    source: Source,
    out: Annotated[Path, typer.Option("--out", metavar="DIR2", help="Where the quantised model goes.")],
    at: Annotated[str, typer.Option(help="The projections to quantise.")] = "attention.*|ffn.*",
    format: Annotated[str, typer.Option(help="nf4, fp4 or int8.")] = "nf4",
    block: Annotated[int, typer.Option(help="Values that share a constant; int8 does not use it.")] = 64,
    double: Annotated[bool, typer.Option(help="Quantise the constants too.")] = True,
    compute: Annotated[str, typer.Option(help="The dtype of products: bfloat16, float16 or float32.")] = "bfloat16",
    force: Annotated[
        bool, typer.Option("--force", help="Replace DIR2 if it is not empty and this command made it.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Quantise a model in the memory of one tensor; transformers loads the result with bitsandbytes."""
    options = {"format": format, "block": block, "double": double, "compute": compute}
    from peftgraph.rewrite.recipe_check import check_options
    from peftgraph.sites.selector_parser import parse_selector

    check_source(source, weights=True)
    selector = parse_selector(at)
    check_options("quantise", options)
    check_target(out, force, (source,))
    from peftgraph.interop.checkpoints.checkpoint import Checkpoint
    from peftgraph.interop.checkpoints.quantised_shards import (
        copy_configuration,
        quantisation_config,
        quantise_shards,
    )
    from peftgraph.rewrite.registry import find_pass

    quantise_pass: Any = find_pass("quantise")
    method = quantise_pass(at=selector, **options)
    before = stamps((source,))
    checkpoint = Checkpoint.open(source)
    model = skeleton(source, checkpoint.dtype)
    with working("choosing weights, on shapes"):
        names = _stored(trace(model).apply(method), checkpoint, model.base_model_prefix)
    linears = {path for path, one in model.named_modules() if type(one).__name__ == "Linear"}
    skipped = linears - {name.removesuffix(".weight") for name in names}
    with atomic_folder(out, force, (source,)) as fresh:
        with working("quantising"):
            written = quantise_shards(checkpoint, set(names.values()), method.quantiser, fresh)
        copy_configuration(source, fresh, quantisation_config(method.quantiser, compute, skipped))
        copy_companions(source, fresh)
        check_unchanged(before, (source,))
    if as_json:
        sizes = {"weights": written.weights, "bytes_before": written.before, "bytes_after": written.after}
        emit({"out": str(out), "format": format, **sizes})
        return
    say(f"{written.weights} weights as {format}: {written.before / 1e9:.2f} GB are {written.after / 1e9:.2f} GB now")
    say(f"quantised model written to {out}", "bold")


def _stored(program: pg.Program, checkpoint: Checkpoint, prefix: str) -> dict[str, str]:
    """Return the quantised weights, each with the name that it is stored under.

    Raises:
        PeftGraphError: a weight is stored in another layout than a linear module of bitsandbytes has.
    """
    from peftgraph.errors import PeftGraphError

    found: dict[str, str] = {}
    for name, how in program.table.quantised.items():
        key = checkpoint.key(program.table.tied(name), prefix)
        if key is None or how.transposed or program.table[name].tensor.dim() != 2:
            raise PeftGraphError(
                f"{name} is not stored as the weight of a linear module, and transformers loads no other as codes. "
                "Choose other projections with --at, or quantise the model in memory (the pass quantise)."
            )
        found[name] = key
    return found
