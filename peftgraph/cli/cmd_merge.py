"""`peftgraph merge`: folds an adapter into its base and writes an ordinary transformers folder, with the proof."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peftgraph.cli.cmd_inspect import Source
from peftgraph.cli.options import Json
from peftgraph.interop.adapter_folder import check_exists
from peftgraph.model_folders.loading import check_source, load, trace
from peftgraph.model_folders.output_folder import atomic_folder, check_target, check_unchanged, copy_companions, stamps
from peftgraph.terminal.console import emit, report, say, working

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    import peftgraph as pg
    from peftgraph.folding.proof import Proof

REST = "adapter"  # the folder in that of the merged model, for what does not fold


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
    partial: Annotated[
        bool,
        typer.Option(
            "--partial",
            help="Fold what folds, and write the rest as an adapter into DIR2/adapter, instead of refusing; "
            "needs --whole.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Fold an adapter into a model and write a plain transformers model, with the proof of what changed."""
    check_source(source, weights=True)
    check_exists(adapter)
    from peftgraph.cli import merge_by_shard

    if by_shard is None:
        in_memory = untie or partial or prove is not Prove.AUTO
        by_shard = not in_memory and merge_by_shard.is_default(source, adapter)
    if not by_shard:
        document = _merge_whole(source, adapter, out, force, partial, {"untie": untie, "prove": prove.value}, as_json)
    else:
        if untie:
            raise typer.BadParameter("--untie changes how many tensors there are and needs --whole")
        if prove is not Prove.AUTO:
            raise typer.BadParameter("--prove computes with whole weights and needs --whole")
        if partial:
            raise typer.BadParameter("--partial keeps a part of the adapter and needs --whole")
        document = merge_by_shard.merge(source, adapter, out, force, as_json)
    if as_json:
        emit({"source": str(source), "adapter": str(adapter), "out": str(out), **document})


def _merge_whole(
    source: Path, adapter: Path, out: Path, force: bool, partial: bool, how: dict[str, Any], quiet: bool
) -> dict[str, Any]:
    """Merge in memory; return what was done, for --json, and print it unless `quiet` is set."""
    with working("importing torch"):
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
            merged = pg.fold(tuned, partial=partial, **how)
        with working("writing"):
            left = _write(merged, tuned, model, fresh)
            copied = copy_companions(source, fresh)
        check_unchanged(before, reads)
    if not quiet:
        say(str(merged.proof))
        report(out, copied)
        if left:
            say(f"adapter with what does not fold written to {out / REST}: {'; '.join(left)}", "bold")
    rest = str(out / REST) if left else None
    return {"by_shard": False, "proof": proof_document(merged.proof), "left": left, "rest": rest, "copied": copied}


def _write(merged: pg.Program, tuned: pg.Program, model: PreTrainedModel, folder: Path) -> list[str]:
    """Write the merged model, and an adapter with the passes that are left; return these.

    Raises:
        PeftGraphError: nothing was folded.
    """
    from peftgraph.errors import PeftGraphError

    if len(merged.edits) == len(tuned.edits):
        reasons = "\n  ".join(merged.proof.left if merged.proof is not None else ())
        raise PeftGraphError(f"Nothing of the adapter folds, so there is nothing to merge:\n  {reasons}")
    rest = _rest(tuned, merged)
    plain = merged
    while plain.history:
        plain = plain.remove()
    plain.write_back(model)
    model.save_pretrained(str(folder))
    if rest.history:
        rest.save_adapter(folder / REST)
    return [str(applied.method) for applied in rest.history]


def _rest(tuned: pg.Program, merged: pg.Program) -> pg.Program:
    """Return the program with the passes alone that a partial fold has left.

    Raises:
        PeftGraphError: a pass is left at some of its sites only, which no recipe says.
    """
    from peftgraph.errors import PeftGraphError

    rest, position = tuned, len(merged.history) - 1
    for number in reversed(range(len(tuned.history))):
        applied = tuned.history[number]
        if position < 0 or applied != merged.history[position]:
            rest = rest.remove(number)
            continue
        before = {edit.site for edit in tuned.edits if edit.application == number}
        now = {edit.site for edit in merged.edits if edit.application == position}
        if now != before:
            raise PeftGraphError(
                f"{applied.method} folds at {len(before) - len(now)} of its {len(before)} sites, and an adapter holds "
                f"whole passes. It does not fold at {', '.join(sorted(now))}: give these sites a pass of their own."
            )
        position -= 1
    return rest


def proof_document(proof: Proof | None) -> dict[str, Any] | None:
    """Return a proof, for --json."""
    return None if proof is None else {**asdict(proof), "text": str(proof)}
