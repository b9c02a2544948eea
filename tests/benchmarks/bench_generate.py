"""Decoding beside the eager base: seconds a token of the merged program, of the unmerged one and of peft's.

    python tests/benchmarks/bench_generate.py

Variants take turns, and ratios of medians are printed, because machines are shared and noisy. Tokens are compared
first.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import peftgraph as pg
from peftgraph.passes import LoRA


def base_model(width: int, layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=1000, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
                         num_attention_heads=8, num_key_value_heads=4)  # fmt: skip
    return LlamaForCausalLM(config).eval()


def measure(width: int, layers: int, tokens: int, rounds: int) -> dict[str, float]:
    """Median seconds a token, by variant."""
    ids = torch.randint(3, 1000, (1, 16))
    eager = base_model(width, layers)
    program = pg.trace(eager, {"input_ids": ids.repeat(2, 1)[:, :9], "use_cache": True})
    tuned = program.apply(LoRA(rank=16))
    theirs: Any = get_peft_model(base_model(width, layers), LoraConfig(r=16, target_modules=["q_proj", "v_proj"]))
    nets: dict[str, Any] = {
        "eager": eager,
        "merged": pg.fold(tuned).module().eval(),
        "ours": tuned.module().eval(),
        "peft": theirs.eval(),
    }

    def run(net: Any) -> torch.Tensor:
        return net.generate(input_ids=ids, min_new_tokens=tokens, max_new_tokens=tokens, pad_token_id=0)

    assert all(torch.equal(run(net), run(eager)) for net in nets.values())
    times: dict[str, list[float]] = {name: [] for name in nets}
    for _ in range(rounds):
        for name, net in nets.items():
            start = time.process_time()
            run(net)
            times[name].append((time.process_time() - start) / tokens)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    torch.set_num_threads(1)
    for width, layers in ((128, 4), (512, 4)):
        found = measure(width, layers, tokens=32, rounds=7)
        print(f"\nh{width}, {layers} layers, one thread, torch {torch.__version__}: {found['eager'] * 1e3:.2f} ms")
        for name, value in found.items():
            print(f"  {name:8} {value / found['eager']:6.3f} x eager")


if __name__ == "__main__":
    main()
