"""Writes the results of the quickstart to its folder, and runs the exported files again on their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import peftgraph as pg
from peftgraph.demo import terminal
from peftgraph.demo.encoder import encoder_folder
from peftgraph.demo.proofreader import Proofreader, accuracy, map_sentences
from peftgraph.demo.rerun_exports import RUNNERS
from peftgraph.demo.settings import Setup
from peftgraph.model_folders.output_folder import atomic_folder, copy_companions
from peftgraph.rewrite.recipe import to_toml
from peftgraph.terminal.console import working
from peftgraph.utils.atomic_files import atomic_file


def write_artifacts(setup: Setup, tuned: pg.Program, merged: pg.Program, head: nn.Linear, scores_NW: Tensor) -> None:
    """Write the recipe, the adapter, the merged model, the head and the exported files, and check them.

    Args:
        setup: of the run.
        tuned: the program with the trained adapter.
        merged: the same, folded.
        head: the trained head.
        scores_NW: the tuned proof-reader's on the test part, to compare with.
    """
    from safetensors.torch import save_file
    from transformers import AutoModel

    out = setup.settings.out
    out.mkdir(parents=True, exist_ok=True)
    with atomic_file(out / "recipe.toml") as path:
        path.write_text(to_toml(tuned.recipe), encoding="utf-8")
    tuned.save_adapter(out / "adapter")
    merged.write_back(setup.model)
    with working("writing the merged model"), atomic_folder(out / "merged", force=True) as folder:
        setup.model.save_pretrained(str(folder))
        copy_companions(encoder_folder(), folder)
    with atomic_file(out / "head.safetensors") as path:
        save_file({"weight": head.weight.detach().contiguous()}, path)
    reloaded = Proofreader(AutoModel.from_pretrained(str(out / "merged"), local_files_only=True).eval(), head)
    with terminal.progress("testing the merged model, read back from disk", len(setup.parts["test"].ids)) as tick:
        again_NW = map_sentences(setup.parts["test"], lambda batch: reloaded(**batch), tick)
    exports: dict[str, Any] = {
        "merged model": {
            "same_predictions": float((again_NW.argmax(-1) == scores_NW.argmax(-1)).float().mean()),
            "accuracy": accuracy(again_NW, setup.parts["test"].places_N),
        }
    }
    setup.metrics["exports"] = exports | _export(setup, tuned, merged)
    terminal.exports(setup.metrics["exports"])


def _export(setup: Setup, tuned: pg.Program, merged: pg.Program) -> dict[str, Any]:
    """Export the merged program in every format, and run each file again."""
    cases = _cases(setup, tuned)
    found: dict[str, Any] = {}
    for suffix in setup.settings.exports:
        file = setup.settings.out / f"merged{suffix}"
        with working(f"exporting and re-running {file.name}"):
            merged.export(file)
            facts = RUNNERS[suffix](file, cases)
        note = {"note": "not run: onnxruntime is not installed"}
        found[file.name] = {"bytes": file.stat().st_size, **(facts or note)}
    return found


def _cases(setup: Setup, tuned: pg.Program) -> dict[str, dict[str, Tensor]]:
    """Return test sentences, one alone and a padded batch, with the outputs of the adapted, unmerged encoder."""
    net = tuned.module().eval()
    test = setup.parts["test"]
    cases: dict[str, dict[str, Tensor]] = {}
    for name, rows in (("alone", [0]), ("batch", list(range(1, min(17, len(test.ids)))))):
        batch = test.inputs(rows)
        with torch.no_grad():
            cases[name] = {**batch, "expected": net(**batch).last_hidden_state}
    return cases
