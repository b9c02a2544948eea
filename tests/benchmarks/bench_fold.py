"""Folding a LoRA with its proof, beside peft's merge_and_unload on the same weights: seconds and peak memory.

    python tests/benchmarks/bench_fold.py [--sizes small,large] [--rounds 3] [--threads 1] [--out bench.json]

Each size has a process of its own. The two take turns, and the merged weights are compared first: what both compute is
rounded once or twice to the stored dtype. Memory is what a call adds to the process beside the new weights, which both
allocate (peft writes them in place of the old ones), by the kernel's own peak of the resident pages. Seconds are the
process's own, since machines are shared.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import peftgraph as pg
from peftgraph.passes import LoRA

RANK, ALPHA = 16, 16.0
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SIZES: dict[str, tuple[int, int, int, torch.dtype]] = {
    "tiny": (128, 2, 512, torch.float32),
    "small": (512, 24, 2048, torch.float32),
    "large": (2048, 16, 5504, torch.bfloat16),
}  # width, layers, hidden features, dtype
MIB = 1 << 20


def base_model(width: int, layers: int, hidden: int, dtype: torch.dtype) -> LlamaForCausalLM:
    """A Llama with random weights."""
    config = LlamaConfig(vocab_size=1000, hidden_size=width, intermediate_size=hidden, num_hidden_layers=layers,
                         num_attention_heads=width // 64, num_key_value_heads=width // 128, dtype=dtype)  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(dtype).eval()


def adapted(model: nn.Module) -> pg.Program:
    """All linear layers with a LoRA that changes them."""
    tuned = pg.trace(model, {"input_ids": torch.randint(0, 1000, (2, 9))}).apply(
        LoRA(at="attention.*|ffn.*", rank=RANK, alpha=ALPHA)
    )
    with torch.no_grad():
        for name, parameter in tuned.table.trainable.items():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.02)
    return tuned


def with_peft(model: nn.Module, tuned: pg.Program) -> Any:
    """The same LoRA as peft's, on a copy of the model."""
    wrapped = get_peft_model(copy.deepcopy(model), LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=LINEARS))
    ours = tuned.table.trainable
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.data = ours[name.removeprefix("base_model.model.").replace(".default.weight", "")].data
    return wrapped


def measured(run: Callable[[], Any]) -> tuple[Any, float, float]:
    """The result of a call, its seconds of processor time, and by how many MiB the process grew on the way."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, start = resident("VmRSS"), time.process_time()
    result = run()
    return result, time.process_time() - start, resident("VmHWM") - before


def resident(field: str) -> float:
    """A field of the process's status, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def compare(folded: pg.Program, merged: nn.Module) -> float:
    """The largest difference of both sides' weights, in epsilons of a tensor's largest value."""
    worst = 0.0
    for name, theirs in merged.named_parameters():
        ours = folded.table[name].tensor
        scale = float(theirs.abs().max()) * torch.finfo(theirs.dtype).eps
        worst = max(worst, float((ours.float() - theirs.float()).abs().max()) / scale)
    assert worst < 8, f"the two disagree by {worst} epsilons"
    return worst


def measure(size: str, rounds: int) -> dict[str, Any]:
    """Median seconds over some rounds, and the memory of the first."""
    model = base_model(*SIZES[size])
    tuned = adapted(model)
    ours: list[tuple[float, float]] = []
    theirs: list[tuple[float, float]] = []
    differs = 0.0
    new = 0
    for _ in range(rounds):
        folded, seconds, grown = measured(lambda: pg.fold(tuned))
        assert folded.proof is not None
        changed = [folded.table[name].tensor for name in folded.proof.changed]
        new = sum(tensor.numel() * tensor.element_size() for tensor in changed)
        ours.append((seconds, grown - new / MIB))
        wrapped = with_peft(model, tuned)
        merged, seconds, grown = measured(wrapped.merge_and_unload)
        theirs.append((seconds, grown))
        differs = compare(folded, merged)
        del folded, changed, wrapped, merged
    seconds, other = (statistics.median(one for one, _ in column) for column in (ours, theirs))
    beside, grown = ours[0][1], theirs[0][1]  # later rounds use what earlier ones gave back
    return {
        "values, millions": sum(parameter.numel() for parameter in model.parameters()) / 1e6,
        "fold with its proof, CPU seconds": seconds,
        "peft's merge_and_unload, CPU seconds": other,
        "ratio": seconds / other,
        "new weights, MiB": new / MIB,
        "fold beside them, MiB": beside,
        "peft beside its own, MiB": grown,
        "weights differ, epsilons": differs,
    }


def main() -> None:
    """Measure each size in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="small,large")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.one:
        print(json.dumps(measure(options.one, options.rounds)))
        return
    results = {}
    for size in options.sizes.split(","):
        command = [sys.executable, __file__, "--one", size, "--rounds", str(options.rounds)]
        command += ["--threads", str(options.threads)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        results[size] = json.loads(text.splitlines()[-1])
        print(f"\n{size} ({options.threads} threads, torch {torch.__version__})")
        for what, value in results[size].items():
            print(f"  {what:34} {value:10.3f}")
    if options.out:
        options.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
