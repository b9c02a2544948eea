"""How long a trace takes, by depth: cold, from the cache, and of `peftgraph inspect` on a configuration alone.

    python tests/benchmarks/bench_trace.py [--layers 2 8 24 80] [--json FILE]

Seconds of processor time of this process, one thread, of Llamas of width 128; the anchor is one static torch.export of
the same model. `shape rules` is how many rules for shapes the export ran: it does not grow with the depth.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import peftgraph as pg


@dataclass(frozen=True)
class Row:
    layers: int
    export: float
    cold: float
    cached: float
    rules: int


def llama(layers: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, vocab_size=256, use_cache=False, **sizes)).eval()


def example() -> dict[str, torch.Tensor]:
    ids = torch.arange(21).view(3, 7)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def rules_of(run: Callable[[], object]) -> int:
    count, rule = 0, FakeTensorMode._dispatch_impl

    def counted(*args: Any) -> Any:
        nonlocal count
        count += torch.compiler.is_exporting()
        return rule(*args)

    FakeTensorMode._dispatch_impl = counted
    try:
        run()
    finally:
        FakeTensorMode._dispatch_impl = rule
    return count


def measured(layers: int, folder: str) -> Row:
    model, call = llama(layers), example()
    export = seconds(lambda: torch.export.export(model, (), call, strict=False))
    cold = seconds(lambda: pg.trace(model, call, cache=folder))
    cached = min(seconds(lambda: pg.trace(model, call, cache=folder)) for _ in range(3))
    rules = rules_of(lambda: pg.trace(model, call, verify="off")) if layers <= 24 else 0
    return Row(layers, export, cold, cached, rules)


def inspected(layers: int, *options: str) -> float:
    """Return the processor time of the command on a configuration."""
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": layers}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        before = getrusage(RUSAGE_CHILDREN)
        code = "from peftgraph.cli import main; main()"
        command = [sys.executable, "-c", code, *options, "inspect", folder]
        subprocess.run(command, check=True, capture_output=True)
        after = getrusage(RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 8, 24, 80])
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        measured(1, folder)  # what torch and transformers import and set up the first time
        rows = [measured(layers, folder) for layers in chosen.layers]
    inspect = inspected(12, "--no-cache")
    print("| layers | static export, s | trace, s | from the cache, s | shape rules |\n|---|---|---|---|---|")
    for row in rows:
        print(f"| {row.layers} | {row.export:.1f} | {row.cold:.1f} | {row.cached:.2f} | {row.rules or '-'} |")
    print(f"inspect of a configuration of 12 layers, with all imports: {inspect:.1f} s")
    if chosen.json is not None:
        chosen.json.write_text(json.dumps({"rows": [asdict(row) for row in rows], "inspect": inspect}, indent=1))


if __name__ == "__main__":
    main()
