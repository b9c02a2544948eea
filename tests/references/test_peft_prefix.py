"""Prefix tuning beside huggingface/peft's at the same values, and where peft's is another method."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
import zoo
from torch import Tensor, nn

import peftgraph as pg
from peftgraph.passes import Prefix

F64 = torch.float64
LENGTH, HIDDEN = 4, 5
CASES = [(name, hidden) for name in ("gpt2", "gpt_neox", "bert") for hidden in (None, HIDDEN)]
CASES += [("llama", None)]  # with grouped heads, peft's MLP starts from the width of the keys, ours from the model's
# peft asks the model in a way that transformers is about to rename
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning"),
]
TASKS = {"bert": "FEATURE_EXTRACTION", "t5": "SEQ_2_SEQ_LM"}  # all others are causal language models


def pair(both: Any, name: str, hidden: int | None, positions: bool = True) -> tuple[Any, pg.Program, dict[str, Any]]:
    """peft's model, our program with the same values, and inputs; `positions`: counted from the prefix's length on."""
    config = peft.PrefixTuningConfig(
        task_type=TASKS.get(name, "CAUSAL_LM"),
        num_virtual_tokens=LENGTH,
        prefix_projection=hidden is not None,
        encoder_hidden_size=hidden,
    )
    theirs = both.wrap(name, config, F64).to(F64)
    inputs = both.example(name, F64)
    more = {"position_ids": torch.arange(LENGTH, LENGTH + 7).expand(3, -1)} if positions else {}
    at = pg.parse_selector('attention.core & stack("decoder") & kind("self")') if name == "t5" else pg.attention.core
    program = pg.trace(zoo.build(name, dtype=F64), inputs | more).apply(Prefix(at=at, length=LENGTH, hidden=hidden))
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in encoder(theirs).parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
        for key, value in values(theirs, program).items():
            program.table[key].tensor.copy_(value)
    return theirs, program, inputs | more


def both_take(inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs without positions, which peft counts by itself."""
    return {key: value for key, value in inputs.items() if key != "position_ids"}


def encoder(theirs: Any) -> nn.Module:
    return theirs.prompt_encoder["default"]


def values(theirs: Any, program: pg.Program, grad: bool = False) -> dict[str, Tensor]:
    """peft's parameters, or their gradients, cut into ours: its last axis is (layer, key or value, head, feature)."""
    wanted = {key: p.grad if grad else p for key, p in encoder(theirs).named_parameters()}
    cores = program.sites.select("attention.core")
    names = [[n for n in edit.parameters if not n.startswith("prefix.")] for edit in program.edits]
    layers = 1 + max(site.layer or 0 for site in cores)
    direct = "transform.0.weight" not in wanted
    found: dict[str, Tensor] = {}
    if not direct:
        shared = ("embedding", "down_weight", "down_bias")
        for ours, key in zip(shared, ("embedding.weight", "transform.0.weight", "transform.0.bias"), strict=True):
            found[f"prefix.self_{ours}"] = wanted[key]
    for edit, own in zip(program.edits, names, strict=True):
        layer = next(site.layer or 0 for site in cores if site.id == edit.site)
        for name in own:
            leaf = name.rpartition(".")[2]
            part = 2 * layer + ("v" in (leaf[0], leaf[-1]))
            if direct:
                found[name] = wanted["embedding.weight"].unflatten(1, (2 * layers, -1))[:, part]
            else:
                key = "transform.2." + leaf.partition("_")[2]
                found[name] = wanted[key].unflatten(0, (2 * layers, -1))[part]
    return found


@pytest.mark.parametrize(("name", "hidden"), CASES)
def test_outputs_and_gradients(both: Any, name: str, hidden: int | None) -> None:
    theirs, program, inputs = pair(both, name, hidden)
    ours, their = both.answer(program.module().eval()(**inputs)), both.answer(theirs(**both_take(inputs)))
    assert both.difference(ours, their) < 1e-12
    both.loss(ours).backward()
    both.loss(their).backward()
    grads = values(theirs, program, grad=True)
    assert grads.keys() == program.table.trainable.keys()
    for key, wanted in grads.items():
        assert wanted.abs().max() > 0, key
        assert both.difference(program.table[key].tensor.grad, wanted) < 1e-10, key


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_peft_counts_positions_from_the_prefix_on(both: Any, name: str) -> None:
    """The paper's prefix has no position, so that ours leaves those of the tokens as they are."""
    theirs, program, inputs = pair(both, name, None, positions=False)
    assert both.difference(both.answer(program.module().eval()(**inputs)), both.answer(theirs(**inputs))) > 1e-3


def test_peft_puts_no_prefix_into_t5_s_encoder_nor_its_cross_attention(both: Any) -> None:
    """It has rows for one attention a layer, hands them to two, and empties the cache of the second."""
    theirs, program, _ = pair(both, "t5", None, positions=False)
    per_attention = 2 * LENGTH * zoo.WIDTH
    assert sum(p.numel() for p in encoder(theirs).parameters()) == 2 * per_attention
    assert program.count().trainable == 2 * per_attention
    cache = theirs.get_prompt(1)
    assert (cache.self_attention_cache.get_seq_length(), cache.cross_attention_cache.get_seq_length()) == (LENGTH, 0)
    assert zoo.traced("t5").apply(Prefix(length=LENGTH, hidden=None)).count().trainable == 6 * per_attention
