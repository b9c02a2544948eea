"""Training steps and bytes kept between the passes, beside huggingface/peft: the plain graph, optimised, with budgets.

    python tests/benchmarks/bench_training.py [--rounds 6] [--models llama bert ...] [--device cuda] [--out out.json]

Variants take turns in one process, and ratios to peft of the smallest processor time are printed, since other work on
a machine only adds time; on other devices than the CPU, of the time until the device is done. Gradients are compared
first. The floor is the base model's own forward pass and the gradient by its embeddings: no adapter, no gradient of a
weight.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

import peftgraph as pg
from peftgraph.passes import LoRA

RANK, LAYERS, WIDTH, BATCH, LENGTH, VOCABULARY = 16, 8, 512, 4, 256, 1000
BUDGETS = (1.0, 0.5, 0.0)


def llama() -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=8, num_key_value_heads=4,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def gpt2() -> PreTrainedModel:
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=LAYERS, n_head=8, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    return GPT2LMHeadModel(config)


def bert() -> PreTrainedModel:
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=8, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForSequenceClassification(config)


MODELS: dict[str, tuple[Callable[[], PreTrainedModel], Any]] = {
    "llama": (llama, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
    "gpt2": (gpt2, ["c_attn", "c_proj", "c_fc"]),
    "bert": (bert, r".*layer\.\d+\..*(query|key|value|dense)"),
}


def build(make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    torch.manual_seed(0)
    return make().eval()


def kept_mib(net: nn.Module, call: dict[str, Any]) -> float:
    """MiB of the memory that a forward pass keeps for its backward pass, besides parameters and buffers."""
    own = {one.untyped_storage().data_ptr() for one in (*net.parameters(), *net.buffers())}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        net(**call).logits.square().mean()
    return sum(one.untyped_storage().nbytes() for one in kept.values()) / 2**20


def step(net: nn.Module, call: dict[str, Any]) -> Callable[[], None]:
    def run() -> None:
        net(**call).logits.square().mean().backward()
        net.zero_grad()

    return run


def interleaved(variants: dict[str, Callable[[], None]], rounds: int, device: torch.device) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in variants}
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    for turn in range(rounds + 1):
        for name, run in variants.items():
            start = clock()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn:
                times[name].append(clock() - start)
    return {name: min(values) for name, values in times.items()}


def measure(name: str, dropout: float, rounds: int, device: torch.device) -> dict[str, Any]:
    make, targets = MODELS[name]
    ids = torch.randint(5, VOCABULARY, (BATCH, LENGTH), device=device)
    example = {"input_ids": torch.randint(5, VOCABULARY, (2, 9))}
    tuned = pg.trace(build(make), example).apply(LoRA(at="attention.*|ffn.*", rank=RANK, alpha=RANK, dropout=dropout))
    nets = {"plain": tuned.module("off").train()}
    nets |= {f"optimised, budget {b}": tuned.module("train", activation_budget=b).train() for b in BUDGETS}
    config = LoraConfig(
        r=RANK, lora_alpha=RANK, target_modules=targets, lora_dropout=dropout, fan_in_fan_out=name == "gpt2"
    )
    peft: Any = get_peft_model(build(make), config).train().to(device)
    base: Any = build(make).train().requires_grad_(False).to(device)
    nets = {key: net.to(device) for key, net in nets.items()}
    call = {"input_ids": ids}
    slow = call if name == "bert" else {**call, "use_cache": False}
    _compare(nets, ids)

    def floor() -> None:
        embedded = base.get_input_embeddings()(ids).detach().requires_grad_()
        rest = {key: value for key, value in slow.items() if key != "input_ids"}
        base(inputs_embeds=embedded, **rest).logits.square().mean().backward()

    runs = {"peft": step(peft, slow), **{key: step(net, call) for key, net in nets.items()}, "floor": floor}
    times = interleaved(runs, rounds, device)
    kept = {"peft": kept_mib(peft, slow), **{key: kept_mib(net, call) for key, net in nets.items()}}
    return {
        "seconds": times["peft"],
        "time": {key: value / times["peft"] for key, value in times.items()},
        "kept MiB": kept["peft"],
        "kept": {key: value / kept["peft"] for key, value in kept.items()},
        "report": str(tuned.explain_cost(nets["optimised, budget 1.0"])),
    }


def _compare(nets: dict[str, nn.Module], ids: Tensor) -> None:
    """Check that all variants have the plain graph's gradients."""
    found: list[dict[str, Tensor]] = []
    for net in nets.values():
        torch.manual_seed(0)
        net(input_ids=ids).logits.square().mean().backward()
        found.append({name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None})
        net.zero_grad()
    for other in found[1:]:
        for name, grad in found[0].items():
            assert float((other[name] - grad).abs().max()) <= 1e-3 * float(grad.abs().max()), name


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--models", nargs="+", default=["llama"], choices=list(MODELS))
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{BATCH} x {LENGTH} tokens, {LAYERS} layers of {WIDTH}, LoRA of rank {RANK} on every projection, one thread")
    results: dict[str, Any] = {}
    for name in options.models:
        for dropout in (0.0, 0.05):
            result = results[f"{name}, dropout {dropout}"] = measure(name, dropout, options.rounds, options.device)
            print(f"\n{name}, dropout {dropout}: peft {result['seconds']:.2f} s, keeps {result['kept MiB']:.0f} MiB")
            for key, value in result["time"].items():
                kept = f"{result['kept'][key]:8.2f}" if key in result["kept"] else ""
                print(f"  {key:24} time {value:6.2f}   kept {kept}")
    if options.out:
        options.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
