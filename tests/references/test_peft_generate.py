"""Generation beside huggingface/peft's: the same tokens from the same LoRA and prefix values."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
import zoo
from torch import Tensor

import peftgraph as pg
from peftgraph.passes import LoRA, Prefix

F64 = torch.float64
LENGTH = 4
# peft asks the model in ways that transformers is about to rename
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning"),
]


def tokens(net: Any, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    torch.manual_seed(1)
    return net.eval().generate(**inputs, min_new_tokens=9, max_new_tokens=9, pad_token_id=0, **options)


@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"num_beams": 3}], ids=["greedy", "sampling", "beams"])
def test_lora(options: dict[str, Any]) -> None:
    tuned = zoo.randomise(zoo.cached("llama").apply(LoRA(rank=2, alpha=4.0)), 0.3)
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"])
    theirs: Any = peft.get_peft_model(zoo.build("llama", dtype=F64), config)
    with torch.no_grad():
        for name, ours in tuned.table.trainable.items():
            theirs.get_parameter(f"base_model.model.{name}.default.weight").copy_(ours)
    inputs = zoo.example("llama")
    inputs["attention_mask"] = inputs["attention_mask"].flip(1)
    expected = tokens(theirs, inputs, **options)
    assert torch.equal(tokens(tuned.module(), inputs, **options), expected)
    assert torch.equal(tokens(pg.fold(tuned).module(), inputs, **options), expected)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_prefix(name: str) -> None:
    """peft counts positions from the prefix's length on; ours do where the call says so. Its own generate() loses the
    prefix under transformers that call the cache `cache`, so that its forward is asked token by token."""
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH)
    theirs: Any = peft.get_peft_model(zoo.build(name, dtype=F64), config).to(F64)
    program = zoo.cached(name).apply(Prefix(length=LENGTH, hidden=None))
    values = theirs.prompt_encoder["default"].embedding.weight
    torch.manual_seed(3)
    with torch.no_grad():
        values.copy_(torch.randn_like(values))
        parts = values.unflatten(1, (len(program.table.trainable), -1)).unbind(1)  # layer by layer: keys, values
        for ours, part in zip(program.table.trainable.values(), parts, strict=True):
            ours.copy_(part)
    inputs = zoo.example(name, masked=False)
    positions = torch.arange(LENGTH, LENGTH + 7).expand(3, -1)
    found = tokens(program.module(), inputs | {"position_ids": positions})
    ids = inputs["input_ids"]
    for _ in range(9):
        logits = theirs.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -1]
        logits[:, theirs.config.eos_token_id] = -torch.inf  # the new tokens have a smallest number
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(found, ids)
    base, tuned = (one.module().eval()(**inputs).logits for one in (zoo.cached(name), program))
    assert float((base - tuned).abs().max().detach()) > 1e-2
