"""Rows of one batch with adapters of their own: `program.serve` beside peft's `adapter_names` and the base alone.

    python tests/benchmarks/bench_serving.py [--out serving.json] [--length 1 16] [--adapters 4 16 64] [--rounds 8]

64 rows of LoRA on queries and values; adapters take turns over the rows. Variants take turns, ratios of medians to the
traced base are printed. Outputs are compared with peft's first. `--ways` forces each way of the product in turn.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from bench_core import base_model, interleaved
from torch import nn

import peftgraph as pg
from peftgraph.passes import LoRA
from peftgraph.serving import product_by_row
from peftgraph.serving.product_costs import Way

ROWS, RANK, WIDTH, LAYERS = 64, 16, 512, 4


def programs(count: int) -> tuple[nn.Module, pg.Program, dict[str, pg.Program]]:
    """The eager base, its program, and adapters with random weights."""
    eager = base_model(WIDTH, LAYERS)
    base = pg.trace(eager, {"input_ids": torch.randint(0, 1000, (2, 9))})
    adapters: dict[str, pg.Program] = {}
    for number in range(count):
        tuned = adapters[f"a{number}"] = base.apply(LoRA(rank=RANK))
        with torch.no_grad():
            for parameter in tuned.table.trainable.values():
                parameter.normal_(std=0.02)
    return eager, base, adapters


def with_peft(eager: nn.Module, adapters: dict[str, pg.Program]) -> Any:
    """The same adapters in peft's model."""
    config = peft.LoraConfig(r=RANK, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    names = list(adapters)
    model: Any = peft.get_peft_model(eager, config, adapter_name=names[0])  # pyright: ignore[reportArgumentType]
    for name in names[1:]:
        model.add_adapter(name, config)
    stored = dict(model.named_parameters())
    with torch.no_grad():
        for name, program in adapters.items():
            for key, value in program.table.trainable.items():
                path, _, leaf = key.rpartition(".")
                stored[f"base_model.model.{path}.{leaf}.{name}.weight"].copy_(value)
    return model.eval()


def forced(way: Way | None, call: Callable[[], object]) -> Callable[[], object]:
    """A call with one way of the product; None leaves the choice by shape."""
    chosen = product_by_row._way

    def run() -> object:
        product_by_row._way = chosen if way is None else lambda *_: way
        try:
            return call()
        finally:
            product_by_row._way = chosen

    return run


@torch.no_grad()
def measure(count: int, length: int, rounds: int, ways: bool) -> dict[str, float]:
    """Ratios to the traced base."""
    ids = torch.randint(0, 1000, (ROWS, length))
    eager, base, adapters = programs(count)
    names = [f"a{row % count}" for row in range(ROWS)]
    plain = base.module("off").eval()
    net: Any = base.serve(adapters).module("off").eval()
    theirs = with_peft(eager, adapters)
    numbers = torch.tensor([net.adapters[name] for name in names])

    def served() -> object:
        return net(input_ids=ids, adapter_ids=numbers)

    found, wanted = net(input_ids=ids, adapter_ids=names).logits, theirs(input_ids=ids, adapter_names=names).logits
    assert (found - wanted).abs().max() < 1e-3, f"the two differ by {float((found - wanted).abs().max())}"
    variants: dict[str, Callable[[], object]] = {
        "base": lambda: plain(input_ids=ids),
        "served": served,
        "peft": lambda: theirs(input_ids=ids, adapter_names=names, use_cache=False),
    }
    if ways:
        every: tuple[Way, ...] = ("gathered", "masked", "segments")
        variants |= {f"served, {way}": forced(way, served) for way in every}
    times = interleaved(variants, rounds)
    return {name: seconds / times["base"] for name, seconds in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--length", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--adapters", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--ways", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{ROWS} rows, {LAYERS} layers of {WIDTH}, LoRA r{RANK} on q and v (one thread, torch {torch.__version__})")
    results: dict[str, dict[str, float]] = {}
    for length in options.length:
        for count in options.adapters:
            key = f"{ROWS} x {length}, {count} adapters"
            results[key] = measure(count, length, options.rounds, options.ways)
            print(f"  {key:28}", "  ".join(f"{name} {value:.2f}" for name, value in results[key].items()), flush=True)
    if options.out:
        options.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
