"""Quantising a synthetic model of several shards, and what training it would take: seconds, peak memory, bytes.

    python tests/benchmarks/bench_quantise.py FOLDER [--layers 9] [--format nf4]
    python tests/benchmarks/bench_quantise.py --counts

The first makes a Llama of 2 GB in FOLDER, quantises it in a process of its own, prints that one's peak memory beside
what its imports took, and deletes the folder. `--counts` counts the bytes of models of 7 and 70 billion parameters on
the meta device: as stored, and with `quantise` and LoRA of rank 64 on all projections.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SIZES = {"hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 24, "num_key_value_heads": 8,
         "vocab_size": 32000, "tie_word_embeddings": False}  # fmt: skip
LARGE = {
    "Llama 7B": {"num_hidden_layers": 32},
    "Llama 70B": {"num_hidden_layers": 80, "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64,
                  "num_key_value_heads": 8},
}  # fmt: skip


def make(folder: Path, layers: int) -> None:
    """Write a random Llama in bfloat16, two layers a shard."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    from peftgraph.model_folders.loading import skeleton

    folder.mkdir(parents=True)
    config = LlamaConfig(**SIZES, num_hidden_layers=layers, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    torch.manual_seed(0)
    shapes = {name: tuple(parameter.shape) for name, parameter in skeleton(folder).named_parameters()}
    groups: dict[int, list[str]] = {}
    for name in shapes:
        groups.setdefault(int(name.split(".")[2]) // 2 if ".layers." in name else -1, []).append(name)
    places: dict[str, str] = {}
    for number, names in groups.items():
        file = f"model-{number + 2:05}-of-{len(groups):05}.safetensors"
        save_file(
            {name: torch.empty(shapes[name], dtype=torch.bfloat16).normal_(std=0.02) for name in names}, folder / file
        )
        places |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def quantise(folder: Path, format: str) -> dict[str, Any]:
    """Quantise all projections of layers; the seconds, and the process's peak memory before and after."""
    from peftgraph.interop.checkpoints.checkpoint import Checkpoint
    from peftgraph.interop.checkpoints.quantised_shards import quantise_shards
    from peftgraph.rewrite.quantiser import Quantiser, bitsandbytes

    bitsandbytes()
    checkpoint = Checkpoint.open(folder / "base")
    names = {name for name in checkpoint.shards if name.endswith("_proj.weight")}
    out = folder / "quantised"
    out.mkdir()
    imported = _peak()
    start = time.perf_counter()
    written = quantise_shards(checkpoint, names, Quantiser(format), out)
    seconds = time.perf_counter() - start
    largest = max(slot.end - slot.begin for file in checkpoint.files for slot in file.slots.values())
    return {
        "weights": written.weights, "GB before": written.before / 1e9, "GB after": written.after / 1e9,
        "seconds": seconds, "peak MB": _peak() / 1e6, "of which imports": imported / 1e6,
        "largest tensor MB": largest / 1e6,
    }  # fmt: skip


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def counts() -> None:
    """Print the bytes of large models, traced with one layer and two: each further layer adds the same."""
    import torch
    import transformers

    import peftgraph as pg
    from peftgraph.passes import LoRA, Quantise

    passes = (Quantise(), LoRA(at=pg.parse_selector("attention.*|ffn.*"), rank=64))
    for name, sizes in LARGE.items():
        found: list[dict[str, int]] = []
        for layers in (1, 2):
            with torch.device("meta"):
                config = transformers.LlamaConfig(**{**sizes, "num_hidden_layers": layers})
                model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
            ids = torch.zeros(2, 8, dtype=torch.long, device="meta")
            program = pg.trace(model, {"input_ids": ids}, verify="off").apply(*passes)
            found.append(vars(program.count().bytes))
        more = sizes["num_hidden_layers"] - 1
        print(
            name,
            {
                part: f"{(a + more * (b - a)) / 1e9:.3f} GB"
                for (part, a), b in zip(found[0].items(), found[1].values(), strict=True)
            },
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--layers", type=int, default=9)
    parser.add_argument("--format", default="nf4")
    parser.add_argument("--counts", action="store_true")
    parser.add_argument("--only", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.counts:
        counts()
    elif given.only:
        print(json.dumps(quantise(given.folder, given.format)))
    else:
        make(given.folder / "base", given.layers)
        command = [sys.executable, __file__, str(given.folder), "--format", given.format, "--only"]
        print(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        shutil.rmtree(given.folder)


if __name__ == "__main__":
    main()
