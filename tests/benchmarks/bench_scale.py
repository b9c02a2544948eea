"""The largest published configurations on the meta device: seconds of one core by phase, and peak memory.

    python tests/benchmarks/bench_scale.py [NAME ...] [--out scale.json]

Every model has a process of its own, so that peak memory (the process's, imports included) is its own. Seconds are
processor time, because machines are shared; wall time is in the JSON.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT-3 175B": ("GPT2LMHeadModel", {"n_layer": 96, "n_embd": 12288, "n_head": 96, "n_positions": 2048}),
    "DeepSeek-V3 671B": ("DeepseekV3ForCausalLM", {}),
    "Llama-3.1 405B": ("LlamaForCausalLM", {"num_hidden_layers": 126, "hidden_size": 16384,
        "num_attention_heads": 128, "num_key_value_heads": 8, "intermediate_size": 53248, "vocab_size": 128256}),
    "OPT 175B": ("OPTForCausalLM", {"num_hidden_layers": 96, "hidden_size": 12288, "ffn_dim": 49152,
        "num_attention_heads": 96, "word_embed_proj_dim": 12288}),
    "BLOOM 176B": ("BloomForCausalLM", {"n_layer": 70, "hidden_size": 14336, "n_head": 112}),
    "Qwen3 235B-A22B": ("Qwen3MoeForCausalLM", {"num_hidden_layers": 94, "hidden_size": 4096,
        "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 12288,
        "moe_intermediate_size": 1536, "num_experts": 128, "num_experts_per_tok": 8}),
    "Mixtral 8x22B": ("MixtralForCausalLM", {"num_hidden_layers": 56, "hidden_size": 6144,
        "num_attention_heads": 48, "num_key_value_heads": 8, "intermediate_size": 16384, "vocab_size": 32768}),
    "T5 11B": ("T5ForConditionalGeneration", {"d_model": 1024, "d_kv": 128, "d_ff": 65536, "num_heads": 128,
        "num_layers": 24}),
}  # fmt: skip
PHASES = ("import", "build", "compare", "export", "normalise", "find sites", "verify", "apply", "text", "count")
SPOKEN = {
    "comparing training with evaluation": "compare",
    "exporting": "export",
    "normalising": "normalise",
    "finding sites": "find sites",
    "verifying": "verify",
}


class Clock:
    """Processor and wall seconds by phase; a phase lasts until the next begins."""

    def __init__(self, phase: str) -> None:
        self.phase = phase
        self.cpu: dict[str, float] = {}
        self.wall: dict[str, float] = {}
        self._at = time.process_time(), time.perf_counter()

    def begin(self, phase: str) -> None:
        now = time.process_time(), time.perf_counter()
        self.cpu[self.phase] = self.cpu.get(self.phase, 0) + now[0] - self._at[0]
        self.wall[self.phase] = self.wall.get(self.phase, 0) + now[1] - self._at[1]
        self.phase, self._at = phase, now


def measure(name: str) -> dict[str, Any]:
    """Builds, traces and rewrites one model in this process."""
    clock = Clock("import")
    import torch
    import transformers

    import peftgraph as pg
    from peftgraph.passes import LoRA

    word, sizes = MODELS[name]
    clock.begin("build")
    cls = getattr(transformers, word)
    with torch.device("meta"):
        model = cls(cls.config_class(**sizes))
    example = {"input_ids": torch.randint(0, 1000, (2, 7))}
    if model.config.is_encoder_decoder:
        example["decoder_input_ids"] = torch.randint(0, 1000, (2, 5))
    program = pg.trace(model, example, progress=lambda phase, *_: clock.begin(SPOKEN[phase]))
    clock.begin("apply")
    tuned = program.apply(LoRA(at="attention.*|ffn.*", rank=8))
    work: dict[str, Callable[[], object]] = {"text": tuned.text, "count": tuned.count}
    for phase, run in work.items():
        clock.begin(phase)
        run()
    clock.begin("end")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux
    return {"model": name, "parameters": program.count().total, "nodes": len(program.graph.nodes),
            "sites": len(program.sites), "edits": len(tuned.edits), "cpu_seconds": clock.cpu,
            "wall_seconds": clock.wall, "peak_rss_gib": peak / 2**20}  # fmt: skip


def row(found: dict[str, Any]) -> str:
    """A line of the table."""
    cells = [found["model"], f"{found['parameters'] / 1e9:.0f}B", f"{found['nodes']:,}", f"{found['sites']:,}"]
    cells += [f"{found['cpu_seconds'][phase]:.1f}" for phase in PHASES]
    cells += [f"{sum(found['cpu_seconds'].values()):.0f}", f"{found['peak_rss_gib']:.2f}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(MODELS)}; all by default")
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    parser.add_argument("--here", action="store_true", help="measure one model in this process, print JSON")
    options = parser.parse_args()
    if unknown := [name for name in options.names if name not in MODELS]:
        parser.error(f"no configuration is called {unknown[0]!r}")
    if options.here:
        print(json.dumps(measure(options.names[0])))
        return
    head = ["model", "parameters", "nodes", "sites", *PHASES, "all, s", "peak, GiB"]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    results = []
    for name in options.names or MODELS:
        command = [sys.executable, __file__, name, "--here"]
        run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        results.append(json.loads(run.stdout.splitlines()[-1]))
        print(row(results[-1]), flush=True)
    if options.out:
        options.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
