"""`peftgraph merge`: folds an adapter into its base and writes an ordinary transformers folder, with the proof."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from peftgraph.cli.cmd_inspect import Source
from peftgraph.interop.adapter_folder import check_exists
from peftgraph.model_folders.loading import check_source, load, trace
from peftgraph.model_folders.output_folder import atomic_folder, check_target, check_unchanged, copy_companions, stamps
from peftgraph.terminal.console import OUT, report, working


class Prove(StrEnum):
    """What a merge in memory proves beside the text and the values of the weights."""

    AUTO = "auto"
    REGIONS = "regions"
    OUTPUTS = "outputs"
    BOTH = "both"


def merge(
    source: Source,
    adapter: Annotated[
        Path,
        typer.Argument(
            metavar="ADAPTER", help="A folder with an adapter: of peftgraph, peft, or another format that it reads."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR2", help="Where the merged model goes.")],
    force: Annotated[
        bool, typer.Option("--force", help="Replace DIR2 if it is not empty and this command made it.")
    ] = False,
    untie: Annotated[
        bool, typer.Option("--untie", help="Give a tied weight that must change a tensor of its own; needs --whole.")
    ] = False,
    by_shard: Annotated[
        bool | None,
        typer.Option(
            "--by-shard/--whole",
            help="Tensor by tensor, in the memory of a few of them and resumable, or in memory, with outputs compared. "
            "Default: by shard where the weights are in several files, or the adapter's format needs no trace (peft).",
        ),
    ] = None,
    prove: Annotated[
        Prove,
        typer.Option(
            "--prove",
            help="Compare what every changed weight computes (regions), the model's outputs, or both; auto: the "
            "regions, and both for a small model. Needs --whole.",
        ),
    ] = Prove.AUTO,
) -> None:
    """Fold an adapter into a model and write a plain transformers model, with the proof of what changed."""
    check_source(source, weights=True)
    check_exists(adapter)
    from peftgraph.cli import merge_by_shard

    if by_shard is None:
        by_shard = not untie and prove is Prove.AUTO and merge_by_shard.is_default(source, adapter)
    if by_shard:
        if untie:
            raise typer.BadParameter("--untie changes how many tensors there are and needs --whole")
        if prove is not Prove.AUTO:
            raise typer.BadParameter("--prove computes with whole weights and needs --whole")
        merge_by_shard.merge(source, adapter, out, force)
    else:
        _merge_whole(source, adapter, out, force, untie, prove)


def _merge_whole(source: Path, adapter: Path, out: Path, force: bool, untie: bool, prove: Prove) -> None:
    import peftgraph as pg

    reads = (source, adapter)
    check_target(out, force, reads)
    before = stamps(reads)
    model = load(source)
    program = trace(model)
    with working("loading the adapter"):
        tuned = program.load_adapter(adapter)
    with atomic_folder(out, force, reads) as fresh:
        with working("folding, with proof"):
            merged = pg.fold(tuned, untie=untie, prove=prove.value)
        with working("writing"):
            merged.write_back(model)
            model.save_pretrained(str(fresh))
            copied = copy_companions(source, fresh)
        check_unchanged(before, reads)
    OUT.print(str(merged.proof), highlight=False, markup=False)
    report(out, copied)
