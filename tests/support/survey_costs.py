"""The survey's table of costs, computed for one model beside the survey's ticks, for docs/methods.md."""

from __future__ import annotations

from dataclasses import dataclass

from published import traced

import peftgraph as pg
from peftgraph.costs.comparison import Comparison
from peftgraph.costs.format import format_bytes

BATCH, LENGTH = 8, 128
EVERYTHING = "train{at=embedding|attention.*|ffn.*|norm|bias}"  # trains what it names: full fine-tuning


@dataclass(frozen=True)
class Tick:
    """What the survey says of a method: whether it saves storage, memory and backpropagation, and slows inference."""

    method: str
    recipe: str
    storage: bool
    memory: bool
    backprop: bool
    overhead: str


TICKS = (
    Tick("Adapters", "houlsby", True, True, False, "an extra network"),
    Tick("Ladder side-tuning", "ladder_side", True, True, True, "an extra network"),
    Tick("Compacter", "compacter", True, True, False, "an extra network"),
    Tick("LoRA", "lora", True, True, False, "none"),
    Tick("(IA)³", "ia3", True, True, False, "an extra gate"),
    Tick("BitFit", "bitfit", True, True, False, "none"),
    Tick("DiffPruning", "diff_pruning", True, False, False, "none"),
    Tick("Intrinsic SAID", "intrinsic_said", False, False, False, "none"),
    Tick("Ladder side-tuning", "ladder_side", True, True, True, "a side network"),
    Tick("Prompt tuning", "prompt", True, True, False, "extra input"),
    Tick("Prefix tuning", "prefix", True, True, False, "extra input"),
    Tick("MAM adapter", "mam", True, True, False, "an extra network and input"),
    Tick("UniPELT", "unipelt", True, True, False, "an extra network and input"),
)
OTHERS = (("AdaLoRA", "adalora"), ("QLoRA", "qlora"), ("the top two layers", "train{top=2}"))
WHY = {
    "Intrinsic SAID": "its random directions follow from a seed, so the file holds the short vector alone",
    "(IA)³": "it folds, so nothing is left of its gates",
}


def section() -> str:
    """Computes the section."""
    recipes = [tick.recipe for tick in TICKS] + [recipe for _, recipe in OTHERS]
    found = pg.compare(traced("bert-base"), [EVERYTHING, *recipes], batch=BATCH, length=LENGTH)
    rows = [_row(tick.method, found, tick.recipe, tick) for tick in TICKS]
    rows += [_row(name, found, recipe, None) for name, recipe in OTHERS]
    full = found[EVERYTHING]
    head = (
        "| method | adapter file | memory of training | operations of a step | gradients reach | a call after folding |"
    )
    file, memory = format_bytes(full.adapter_file), format_bytes(full.training_memory)
    return f"""On BERT-base, {BATCH} rows of {LENGTH} tokens, by `pg.compare`, as parts of full fine-tuning (file
{file}, memory {memory}) and, for a call, of the base. In brackets the tick of the survey (arXiv 2303.15647):
whether it saves storage, memory and backpropagation, and what it adds to inference. The survey has none for the last
three.

{head}
|---|---|---|---|---|---|
{chr(10).join(rows)}

{_differences(found)}
"""


def _row(name: str, found: Comparison, recipe: str, tick: Tick | None) -> str:
    one, full = found[recipe], found[EVERYTHING]
    told = ["", "", "", ""]
    if tick is not None:
        told = [f" ({'yes' if said else 'no'})" for said in (tick.storage, tick.memory, tick.backprop)]
        told.append(f" ({tick.overhead})")
    cells = [
        f"{one.adapter_file / full.adapter_file:.2%}{told[0]}",
        f"{one.training_memory / full.training_memory:.0%}{told[1]}",
        f"{one.step_operations / full.step_operations:.0%}{told[2]}",
        f"{one.backward_blocks} of {one.blocks} blocks",
        f"{one.folded_operations / found.base.forward:.1%}{told[3]}",
    ]
    return f"| {name} | {' | '.join(cells)} |"


def _differences(found: Comparison) -> str:
    """Says where what is computed differs from the ticks."""
    lines: list[str] = []
    full = found[EVERYTHING]
    for tick in TICKS:
        one = found[tick.recipe]
        computed = {
            "storage": one.adapter_file < 0.5 * full.adapter_file,
            "memory": one.training_memory < 0.9 * full.training_memory,
            "backpropagation": one.backward_blocks < one.blocks,
        }
        said = dict(zip(computed, (tick.storage, tick.memory, tick.backprop), strict=True))
        wrong = [f"{what} {'saved' if yes else 'not saved'}" for what, yes in computed.items() if yes != said[what]]
        if (one.folded_operations > found.base.forward) != (tick.overhead != "none"):
            wrong.append("no cost of a call after folding" if tick.overhead != "none" else "a cost of a call")
        if wrong:
            why = WHY.get(tick.method)
            lines.append(f"- {tick.method}: {', '.join(wrong)}{f': {why}' if why else ''}.")
    told = "\n".join(lines) or "- nowhere."
    return f"""Where the two differ:

{told}

Saved means here: a file below half of full fine-tuning's, memory below nine tenths, gradients that do not reach all
blocks. In all methods without that last tick the operations of a step fall by those of the frozen weights' gradients
alone."""
