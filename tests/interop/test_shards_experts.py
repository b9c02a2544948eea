"""Checkpoints that store every expert by itself: merged expert by expert, to the bits of the stacks' own merge."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
import zoo
from sharded import contents, differing, own_updates, silent
from torch import Tensor
from transformers import PreTrainedModel, Qwen2MoeConfig, Qwen2MoeForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import peftgraph as pg
from peftgraph.interop.checkpoints.checkpoint import INDEX, Checkpoint
from peftgraph.interop.checkpoints.shard_writer import write_shards
from peftgraph.interop.peft.merge_updates import peft_updates
from peftgraph.model_folders.loading import skeleton

SIZES: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 48, "intermediate_size": 80, "moe_intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
}  # fmt: skip
MODELS: dict[str, Callable[[], Any]] = {
    "mixtral": lambda: zoo.build("mixtral"),
    "qwen2_moe": lambda: Qwen2MoeForCausalLM(Qwen2MoeConfig(**SIZES, num_experts=4)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, num_experts=4)),
}
RECIPE = "lora{rank=2 at=attention.*|ffn.*}; ia3{at=attention.v|ffn.hidden}"
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def built(name: str, dtype: torch.dtype) -> PreTrainedModel:
    torch.manual_seed(0)
    model = MODELS[name]().to(dtype).eval()
    model.config.dtype = dtype
    return model


def saved(model: Any, folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder, max_shard_size="20KB")
    return folder


def tuned_of(model: PreTrainedModel, recipe: str) -> pg.Program:
    traced = pg.trace(model, {"input_ids": torch.randint(0, 61, (2, 7))})
    return zoo.randomise(traced.apply(pg.load_recipe(recipe)))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("mixtral", torch.float32),
        ("mixtral", torch.bfloat16),
        ("qwen2_moe", torch.bfloat16),
        ("qwen3_moe", torch.float32),
    ],
)
def test_experts_hold_the_bits_of_write_back(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = built(name, dtype)
    folder = saved(model, tmp_path / "model")
    tuned = tuned_of(model, RECIPE)
    checkpoint, updates = own_updates(folder, tuned.save_adapter(tmp_path / "adapter"))
    experts = [key for key in checkpoint.shards if ".experts." in key]
    assert len(experts) == 2 * 4 * 3  # layers, experts, matrices
    assert len({checkpoint.shards[key].path for key in experts}) > 2
    assert set(experts) <= updates.changed.keys()
    assert max(len(updates.changed[key]) for key in experts) == 2  # the gate and the branch that it gates
    write_shards(checkpoint, updates, tmp_path / "out", silent)
    saved(pg.fold(tuned).write_back(model), tmp_path / "whole")
    assert differing(contents(tmp_path / "out"), contents(tmp_path / "whole")) == []
    changed = differing(contents(tmp_path / "out"), contents(folder))
    assert set(experts) <= set(changed) <= updates.changed.keys()  # a bias that is zero stays


def test_what_trains_as_a_stack_goes_back_in_pieces(tmp_path: Path) -> None:
    model = built("mixtral", torch.float32)
    folder = saved(model, tmp_path / "model")
    tuned = tuned_of(model, "train{at=ffn.*}; ia3{at=ffn.hidden}")
    checkpoint, updates = own_updates(folder, tuned.save_adapter(tmp_path / "adapter"))
    write_shards(checkpoint, updates, tmp_path / "out", silent)
    saved(pg.fold(tuned).write_back(model), tmp_path / "whole")
    assert differing(contents(tmp_path / "out"), contents(tmp_path / "whole")) == []


@pytest.mark.parametrize("name", MODELS)
def test_experts_hold_the_bits_of_pefts_merge(name: str, tmp_path: Path) -> None:
    folder = saved(built(name, torch.float32), tmp_path / "model")
    config = peft.LoraConfig(target_modules=["v_proj"], target_parameters=EXPERTS, r=3, lora_alpha=5,
                             rank_pattern={"mlp.experts.down_proj": 2}, init_lora_weights=False)  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(built(name, torch.float32), config)  # pyright: ignore
        wrapped.save_pretrained(str(tmp_path / "adapter"))
        merged: Any = wrapped.merge_and_unload()  # pyright: ignore
    checkpoint = Checkpoint.open(folder)
    updates = peft_updates(skeleton(folder, checkpoint.dtype), tmp_path / "adapter", checkpoint)
    assert len(updates.changed) == 2 + 2 * 4 * 3
    write_shards(checkpoint, updates, tmp_path / "out", silent)
    expected = contents(saved(merged, tmp_path / "whole"))
    assert differing(contents(tmp_path / "out"), expected) == []
    assert set(differing(expected, contents(folder))) == updates.changed.keys()


def test_a_mapping_that_is_not_exact_is_refused(tmp_path: Path) -> None:
    model = built("mixtral", torch.float32)
    folder = saved(model, tmp_path / "model")
    adapter = tuned_of(model, RECIPE).save_adapter(tmp_path / "adapter")
    key = next(key for key in Checkpoint.open(folder).shards if ".experts.2.w3" in key)
    shard = Checkpoint.open(folder).shards[key].path
    whole = safetensors.torch.load_file(shard)

    def refused(tensors: dict[str, Tensor]) -> None:
        safetensors.torch.save_file(tensors, shard)
        with pytest.raises(pg.PeftGraphError, match="stores no .*gate_up_proj.*not by stacking them alone"):
            own_updates(folder, adapter)

    refused(whole | {key: whole[key].half()})  # loading would round or widen one expert alone
    refused(whole | {key: whole[key][:-1].contiguous()})
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"].pop(key)
    (folder / INDEX).write_text(json.dumps(index))
    refused({name: value for name, value in whole.items() if name != key})
