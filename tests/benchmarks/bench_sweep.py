"""Times a step of eight variants that train together against a step of each alone, on random weights.

    python tests/benchmarks/bench_sweep.py [--rounds 7] [--batch 1] [--length 16]

Prints the median time of eight steps alone, one step together, and their ratio, measured in turns in one process on one
thread. Both compute the same losses and end in the same parameters (tests/experiments/test_sweep.py).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import peftgraph as pg
from peftgraph.experiments.sweep import Sweep, Variant
from peftgraph.losses import label_losses
from peftgraph.passes import LoRA

RANKS = (2, 4, 4, 8, 8, 16, 16, 32)


def seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    for name, value in (("rounds", 7), ("batch", 1), ("length", 16), ("width", 256), ("layers", 4)):
        options.add_argument(f"--{name}", type=int, default=value)
    given = options.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = {"hidden_size": given.width, "intermediate_size": 3 * given.width, "num_hidden_layers": given.layers}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=2000, num_attention_heads=8, num_key_value_heads=8, **sizes)).eval()
    ids = torch.randint(2000, (given.batch, given.length))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    program = pg.trace(model, {name: value.repeat(3, 1) for name, value in batch.items()})
    batch["labels"] = ids
    variants = {f"run{i}": Variant(LoRA(rank=rank), 1e-3 / (i + 1)) for i, rank in enumerate(RANKS)}
    together = Sweep.of(program, variants, causal=True)
    alone = [(program.apply(one.method).module().train(), one.lr) for one in variants.values()]

    def apart_step() -> None:
        for net, lr in alone:
            optimiser = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=lr)
            logits = net(input_ids=ids, attention_mask=batch["attention_mask"]).logits
            values, mask = label_losses(logits, ids, shift=True)
            values[mask].mean().backward()
            optimiser.step()
            optimiser.zero_grad()

    def joint_step() -> None:
        together.train([batch], 1)

    apart_step()
    joint_step()
    times = [(seconds(apart_step), seconds(joint_step)) for _ in range(given.rounds)]
    apart, joint = (statistics.median(column) for column in zip(*times, strict=True))
    ratio = statistics.median(a / b for a, b in times)
    sizes_text = f"{given.layers} layers of {given.width}, {given.batch} x {given.length} tokens a variant"
    print(f"{sizes_text}: eight alone {1e3 * apart:.0f} ms, together {1e3 * joint:.0f} ms, ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
