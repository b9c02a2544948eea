"""Merging a LoRA into a synthetic model of 14 shards and 6 GB: seconds, bytes a second, and peak memory.

    python tests/benchmarks/bench_merge.py FOLDER [--layers 28] [--runs 3] [--recipe SPEC] [--keep]

FOLDER is made for the model, its copy and its merge, 18 GB in all, and deleted afterwards; what `--keep` left is used
again. Making, copying and merging have processes of their own, so that peak memory (the process's, imports included) is
their own. Copies and merges take turns, as the machine's other work may come and go; the last line has their medians.
What is written is flushed to the disk within the time that is measured; what is read may come from memory.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

SIZES = {"hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 24, "num_key_value_heads": 8,
         "vocab_size": 32000, "tie_word_embeddings": False}  # fmt: skip
RECIPE = "lora{rank=8 at=attention.*|ffn.*}"


def make(folder: Path, layers: int, recipe: str) -> dict[str, Any]:
    """Writes a random Llama in bfloat16, two layers a shard, and a LoRA of it with every parameter moved."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    import peftgraph as pg
    from peftgraph.model_folders.loading import load, skeleton, trace

    base = folder / "base"
    base.mkdir(parents=True)
    config = LlamaConfig(**SIZES, num_hidden_layers=layers, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    config.save_pretrained(base)
    torch.manual_seed(0)
    shapes = {name: tuple(parameter.shape) for name, parameter in skeleton(base).named_parameters()}
    count = (layers + 1) // 2
    places: dict[str, str] = {}
    for number in range(count):
        file = f"model-{number + 1:05}-of-{count:05}.safetensors"
        own = [name for name in shapes if _shard(name, count) == number]
        save_file({name: _random(shapes[name]) for name in own}, base / file)
        places |= dict.fromkeys(own, file)
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    tuned = trace(load(base)).apply(pg.load_recipe(recipe))
    with torch.no_grad():
        for parameter in tuned.table.trainable.values():
            parameter.normal_(std=0.02)
    tuned.save_adapter(folder / "adapter")
    return {"parameters": tuned.count().total, "shards": count}


def _shard(name: str, count: int) -> int:
    parts = name.split(".")
    return int(parts[2]) // 2 if "layers" in parts else 0 if "embed" in name else count - 1


def _random(shape: tuple[int, ...]) -> Any:
    import torch

    return torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02)


def copy(folder: Path) -> dict[str, Any]:
    """Copies the files of the model, in blocks of the size that the merge uses."""
    from peftgraph.interop.checkpoints.tensor_file import CHUNK

    start, cpu, size = time.perf_counter(), time.process_time(), 0
    (folder / "copy").mkdir()
    for path in sorted((folder / "base").iterdir()):
        with path.open("rb", buffering=0) as source, (folder / "copy" / path.name).open("wb") as target:
            shutil.copyfileobj(source, target, CHUNK)
            target.flush()
            os.fsync(target.fileno())
        size += path.stat().st_size
    seconds = {"write": time.perf_counter() - start}
    return {"bytes": size, "seconds": seconds, "write_cpu_seconds": time.process_time() - cpu}


def merge(folder: Path) -> dict[str, Any]:
    """Does what `peftgraph merge` does, phase by phase."""
    marks = [("start", time.perf_counter())]

    def mark(phase: str) -> None:
        marks.append((phase, time.perf_counter()))

    from peftgraph.interop.checkpoints.checkpoint import Checkpoint
    from peftgraph.interop.checkpoints.folded_updates import folded_updates
    from peftgraph.interop.checkpoints.shard_writer import write_shards
    from peftgraph.interop.checkpoints.storage_layout import StorageLayout
    from peftgraph.model_folders.loading import skeleton, trace

    checkpoint = Checkpoint.open(folder / "base")
    model = skeleton(folder / "base", checkpoint.dtype)
    mark("import and build")
    program = trace(model)
    mark("trace")
    layout = StorageLayout.of(model, checkpoint)
    updates = folded_updates(program, program.sites, program.apply, folder / "adapter", layout)
    mark("decide")
    before, cpu = _peak(), time.process_time()
    write_shards(checkpoint, updates, folder / "merged", lambda count: None)
    mark("write")
    seconds = {phase: at - marks[number][1] for number, (phase, at) in enumerate(marks[1:])}
    return {"bytes": checkpoint.size, "seconds": seconds, "write_cpu_seconds": time.process_time() - cpu,
            "changed": len(updates.changed), "peak_before_gb": before}  # fmt: skip


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # KiB on Linux


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where 18 GB are free")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--runs", type=int, default=3, help="of each")
    parser.add_argument("--recipe", default=RECIPE, help="what is merged")
    parser.add_argument("--keep", action="store_true", help="delete nothing")
    parser.add_argument("--here", choices=("make", "copy", "merge"), help="one step in this process, print JSON")
    options = parser.parse_args()
    if options.here:
        steps = {
            "make": lambda: make(options.folder, options.layers, options.recipe),
            "copy": lambda: copy(options.folder),
            "merge": lambda: merge(options.folder),
        }
        print(json.dumps(steps[options.here]() | {"peak_gb": _peak()}))
        return
    made = options.folder.exists()
    found: dict[str, list[dict[str, Any]]] = {}
    try:
        for step in (() if made else ("make",)) + ("copy", "merge") * options.runs:
            shutil.rmtree(options.folder / {"copy": "copy", "merge": "merged"}.get(step, "none"), ignore_errors=True)
            own = ["--layers", str(options.layers), "--recipe", options.recipe, "--here", step]
            command = [sys.executable, __file__, str(options.folder), *own]
            run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found.setdefault(step, []).append(json.loads(run.stdout.splitlines()[-1]))
            print(f"{step}: {json.dumps(found[step][-1])}", flush=True)
        for what, value in (
            ("wall", lambda one: one["seconds"]["write"]),
            ("processor", lambda one: one["write_cpu_seconds"]),
        ):
            copied, merged = (median(value(one) for one in found[step]) for step in ("copy", "merge"))
            print(f"{what} seconds: copy {copied:.1f}, merge {merged:.1f}, a ratio of {merged / copied:.2f}")
    finally:
        if not options.keep:
            shutil.rmtree(options.folder)


if __name__ == "__main__":
    main()
