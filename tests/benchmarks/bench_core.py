"""Side by side with huggingface/peft in one process: latency, a training step, saved bytes, insertion, folding.

    python tests/benchmarks/bench_core.py [--out bench.json]

Variants take turns, and ratios of medians are printed, because machines are shared and noisy. Outputs are compared
first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import LlamaConfig, LlamaForCausalLM

import peftgraph as pg
from peftgraph.passes import LoRA

RANK, ALPHA = 16, 16.0
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def base_model(width: int, layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=1000, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
                         num_attention_heads=8, num_key_value_heads=4)  # fmt: skip
    return LlamaForCausalLM(config).eval()


def interleaved(variants: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The median seconds of each variant; they take turns, after two rounds of warm-up."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 2):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            if turn >= 2:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def saved_bytes(run: Callable[[], Tensor]) -> int:
    """Bytes of the unique storages that a forward keeps for its backward, parameters excluded."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter) and tensor.grad_fn is not None:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(kept.values())


def with_peft(model: nn.Module, tuned: pg.Program) -> nn.Module:
    """peft's LoRA on every linear, with the weights of ours."""
    wrapped = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=LINEARS))
    ours = tuned.table.trainable
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                path = name.removeprefix("base_model.model.").replace(".default.weight", "")
                parameter.copy_(ours[path])
    return wrapped


def measure(width: int, layers: int, batch: int, length: int, rounds: int) -> dict[str, float]:
    """Ratios to the eager base (latency) and to peft (everything else)."""
    ids = torch.randint(0, 1000, (batch, length))
    eager = base_model(width, layers)
    program = pg.trace(eager, {"input_ids": torch.randint(0, 1000, (2, 9))})
    tuned = program.apply(LoRA(at="attention.*|ffn.*", rank=RANK, alpha=ALPHA))
    with torch.no_grad():
        for name, parameter in tuned.table.trainable.items():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.02)
    theirs, ours = with_peft(base_model(width, layers), tuned), tuned.module()
    merged = pg.fold(tuned).module().eval()
    call = {"input_ids": ids, "use_cache": False}
    with torch.no_grad():
        difference = (ours.eval()(input_ids=ids).logits - theirs(**call).logits).abs().max()
        assert float(difference) < 1e-3, f"the two disagree by {float(difference)}"

    @torch.no_grad()
    def latency() -> dict[str, float]:
        return interleaved(
            {
                "eager": lambda: eager(**call),
                "merged": lambda: merged(input_ids=ids),
                "ours": lambda: ours(input_ids=ids),
                "peft": lambda: theirs(**call),
            },
            rounds,
        )

    def step(net: nn.Module, inputs: dict[str, object]) -> Callable[[], object]:
        def run() -> None:
            net(**inputs).logits.square().mean().backward()
            net.zero_grad()

        return run

    forward = latency()
    train = interleaved(
        {"ours": step(ours.train(), {"input_ids": ids}), "peft": step(theirs.train(), call)}, max(3, rounds // 4)
    )
    recipe = LoRA(at="attention.*|ffn.*", rank=RANK)
    set_up = interleaved({"fold": lambda: pg.fold(tuned), "insert": lambda: program.apply(recipe)}, 3)
    kept = saved_bytes(lambda: ours(input_ids=ids).logits.sum()) / saved_bytes(lambda: theirs(**call).logits.sum())
    return {
        "forward, merged / eager": forward["merged"] / forward["eager"],
        "forward, ours unmerged / eager": forward["ours"] / forward["eager"],
        "forward, peft unmerged / eager": forward["peft"] / forward["eager"],
        "train step, ours / peft": train["ours"] / train["peft"],
        "saved bytes, ours / peft": kept,
        "fold with its proof, seconds": set_up["fold"],
        "apply, seconds": set_up["insert"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for name, sizes in {
        "1 x 1, h128, 8 layers": (128, 8, 1, 1, 40),
        "1 x 1, h512, 8 layers": (512, 8, 1, 1, 20),
        "4 x 128, h256, 4 layers": (256, 4, 4, 128, 6),
    }.items():
        results[name] = measure(*sizes)
        print(f"\n{name} (one thread, torch {torch.__version__})")
        for what, value in results[name].items():
            print(f"  {what:34} {value:8.3f}")
    if options.out:
        options.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
