"""Checkpoints that are quantised tensor by tensor: what transformers and bitsandbytes read."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import bitsandbytes.functional as reference
import pytest
import torch
import transformers
from safetensors.torch import load_file
from typer.testing import CliRunner

import peftgraph as pg
from peftgraph.cli.app import app
from peftgraph.interop.checkpoints.checkpoint import Checkpoint
from peftgraph.interop.checkpoints.quantised_shards import quantise_shards
from peftgraph.passes import LoRA, Quantise
from peftgraph.rewrite.quantiser import Quantiser

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama in bfloat16, in several shards."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    path = tmp_path_factory.mktemp("llama")
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path, max_shard_size="30KB")
    return path


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_what_the_command_writes_is_loaded_by_transformers(folder: Path, tmp_path: Path, format: str) -> None:
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["quantise", str(folder), "--out", str(out), "--format", format])
    assert result.exit_code == 0, result.output
    assert "7 weights as" in result.output
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(out, device_map={"": "cpu"})
    kind = bnb.nn.Linear4bit if format == "nf4" else bnb.nn.Linear8bitLt
    assert sum(isinstance(one, kind) for one in loaded.modules()) == 7
    assert type(loaded.lm_head) is torch.nn.Linear
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ours = pg.trace(plain, {"input_ids": IDS}, verify="off").apply(Quantise(format=format))  # pyright: ignore[reportArgumentType]
    theirs = pg.trace(loaded, {"input_ids": IDS}, verify="off")
    codes = {name: value for name, value in ours.table.hashes().items() if "weight_" in name}
    assert codes
    assert codes.items() <= theirs.table.hashes().items()
    outputs = [one.module().eval()(input_ids=IDS).logits for one in (ours, theirs)]
    assert torch.equal(*outputs)
    assert theirs.apply(LoRA(rank=2)).count().trainable == 4 * 2 * (64 + 64) // 2 - 2 * 32


def test_codes_are_bitsandbytes_own(folder: Path, tmp_path: Path) -> None:
    """Every tensor of a file of several shards; what is not quantised is copied."""
    checkpoint = Checkpoint.open(folder)
    name = "model.layers.0.mlp.down_proj.weight"
    counted: list[int] = []
    written = quantise_shards(checkpoint, {name}, Quantiser("fp4", 128, True), tmp_path, counted.append)
    assert written.weights == 1
    before: dict[str, torch.Tensor] = {}
    after: dict[str, torch.Tensor] = {}
    for file in checkpoint.files:
        before |= load_file(file.path)
        after |= load_file(tmp_path / file.path.name)
    codes, state = reference.quantize_4bit(before[name], blocksize=128, compress_statistics=True, quant_type="fp4")
    assert torch.equal(after[name], codes)
    packed = {key: value for key, value in after.items() if key.startswith(f"{name}.")}
    again = reference.QuantState.from_dict(dict(packed), torch.device("cpu"))
    assert again == state
    assert again.offset == state.offset
    assert torch.equal(reference.dequantize_4bit(after[name], again), reference.dequantize_4bit(codes, state))
    rest = before.keys() - {name}
    assert rest == after.keys() - packed.keys() - {name}
    assert all(torch.equal(before[key], after[key]) for key in rest)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == after.keys()
    assert sum(counted) == sum(tensor.numel() * tensor.element_size() for tensor in before.values())


def test_what_is_refused(folder: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    with pytest.raises(pg.PeftGraphError, match="stores no gone"):
        quantise_shards(checkpoint, {"gone"}, Quantiser(), tmp_path)
    with pytest.raises(pg.PeftGraphError, match="no weight of a linear module"):
        quantise_shards(checkpoint, {"model.norm.weight"}, Quantiser(), tmp_path)
    assert not list(tmp_path.iterdir())
    result = CliRunner().invoke(app, ["quantise", str(folder), "--out", str(tmp_path), "--at", "norm"])
    assert result.exit_code == 1
