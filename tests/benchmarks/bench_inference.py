"""Latency of `module(optimise="infer")`: a forward of few tokens, unmerged and merged, beside the eager base.

    python tests/benchmarks/bench_inference.py [--out inference.json] [--alone]

Variants take turns, and ratios of medians are printed. Outputs are compared first. With `--alone`, also what is lost
without each rewrite.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_core import ALPHA, RANK, base_model, interleaved
from torch import Tensor, nn

import peftgraph as pg
from peftgraph.optimise import inference_graphs
from peftgraph.passes import LoRA

NEEDED = ("read_input_sizes", "stored_first")  # which others rely on


def programs(width: int, layers: int) -> tuple[nn.Module, dict[str, pg.Program]]:
    eager = base_model(width, layers)
    base = pg.trace(eager, {"input_ids": torch.randint(0, 1000, (2, 9))})
    tuned = base.apply(LoRA(at="attention.*|ffn.*", rank=RANK, alpha=ALPHA))
    with torch.no_grad():
        for name, parameter in tuned.table.trainable.items():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.02)
    return eager, {"base": base, "unmerged": tuned, "merged": pg.fold(tuned)}


def calls_of(net: Any) -> int:
    (code,) = net._peftgraph.inference.values()
    assert code.refusals == [], code.refusals
    return sum(node.op == "call_function" for node in code.prepared.staged.rest.graph.nodes)


def compared(net: nn.Module, plain: nn.Module, ids: Tensor) -> Callable[[], object]:
    """Return a call of a module whose outputs are those of another."""
    difference = (net(input_ids=ids).logits - plain(input_ids=ids).logits).abs().max()
    assert float(difference) < 1e-4, f"the two differ by {float(difference)}"
    return lambda: net(input_ids=ids)


def without_each(program: pg.Program) -> dict[str, nn.Module]:
    """Modules without one of the rewrites each."""
    rewrites, found = inference_graphs.REWRITES, dict[str, nn.Module]()
    for name in dict.fromkeys(one.__name__ for one in rewrites if one.__name__ not in NEEDED):
        inference_graphs.REWRITES = tuple(one for one in rewrites if one.__name__ != name)
        found[f"unmerged without {name}"] = net = program.module("infer").eval()
        net(input_ids=torch.ones(1, 1, dtype=torch.int64))
    inference_graphs.REWRITES = rewrites
    return found


@torch.no_grad()
def measure(width: int, layers: int, batch: int, length: int, rounds: int, alone: bool) -> dict[str, float]:
    """Ratios to the eager base."""
    ids = torch.randint(0, 1000, (batch, length))
    eager, made = programs(width, layers)
    variants: dict[str, Callable[[], object]] = {"eager": lambda: eager(input_ids=ids, use_cache=False)}
    for name, program in made.items():
        plain, fast = program.module("off").eval(), program.module("infer").eval()
        variants[f"{name}, plain"] = lambda plain=plain: plain(input_ids=ids)
        variants[name] = compared(fast, plain, ids)
        print(f"  {name}: {calls_of(fast)} calls")
    if alone:
        variants |= {
            name: compared(net, made["unmerged"].module("off").eval(), ids)
            for name, net in without_each(made["unmerged"]).items()
        }
    times = interleaved(variants, rounds)
    return {name: seconds / times["eager"] for name, seconds in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--alone", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for name, sizes in {
        "1 x 1, h128, 8 layers": (128, 8, 1, 1, 60),
        "1 x 1, h512, 8 layers": (512, 8, 1, 1, 30),
        "4 x 128, h256, 4 layers": (256, 4, 4, 128, 8),
    }.items():
        print(f"\n{name} (one thread, torch {torch.__version__})")
        results[name] = measure(*sizes, options.alone)
        for what, value in results[name].items():
            print(f"  {what:40} {value:8.3f}")
    if options.out:
        options.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
