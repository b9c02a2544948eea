"""Prompt tuning, P-tuning and LLaMA-Adapter beside huggingface/peft's at the same values, and where peft's differ."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
import zoo
from torch import Tensor, nn

import peftgraph as pg
from peftgraph.authoring import Pass
from peftgraph.passes import Prompt, PTuning, ZeroInitPrefix

F64 = torch.float64
LENGTH, HIDDEN = 4, 6
# peft asks the model in a way that transformers is about to rename
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
TASKS = {"bert": "FEATURE_EXTRACTION"}  # all others are causal language models


def encoder(theirs: Any) -> nn.Module:
    return theirs.prompt_encoder["default"]


def randomised(module: nn.Module) -> None:
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))


def given(name: str, program: pg.Program, theirs: nn.Module) -> dict[str, Tensor]:
    """peft's parameter for each of ours, by our name."""
    wanted = dict(theirs.named_parameters())
    found: dict[str, Tensor] = {}
    for full in program.table.trainable:
        leaf = full.rpartition(".")[2]
        if leaf in ("prompt", "start"):
            key = "embedding.weight"
        elif leaf.startswith("lstm_"):
            key = leaf.replace("lstm_", "lstm_head.", 1)
        else:
            key = f"mlp_head.{2 * int(leaf[5])}.{leaf.partition('_')[2]}"
        found[full] = wanted[key]
    return found


CASES: dict[str, tuple[Pass, Any]] = {
    "prompt": (Prompt(length=LENGTH), lambda task: peft.PromptTuningConfig(task_type=task, num_virtual_tokens=LENGTH)),
    "lstm": (
        PTuning(length=LENGTH, hidden=HIDDEN),
        lambda task: peft.PromptEncoderConfig(
            task_type=task,
            num_virtual_tokens=LENGTH,
            encoder_reparameterization_type="LSTM",
            encoder_hidden_size=HIDDEN,
        ),
    ),
    "mlp": (
        PTuning(length=LENGTH, encoder="mlp", hidden=HIDDEN),
        lambda task: peft.PromptEncoderConfig(task_type=task, num_virtual_tokens=LENGTH, encoder_hidden_size=HIDDEN),
    ),
}


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients(both: Any, case: str, name: str) -> None:
    method, config = CASES[case]
    theirs = both.wrap(name, config(TASKS.get(name, "CAUSAL_LM")), F64).to(F64)
    program = zoo.traced(name, "sdpa", F64).apply(method)
    randomised(encoder(theirs))
    pairs = given(name, program, encoder(theirs))
    with torch.no_grad():
        for full, value in pairs.items():
            program.table[full].tensor.copy_(value)
    inputs = both.example(name, F64)
    ours = both.answer(program.module().eval()(**inputs))
    wanted = both.answer(theirs.eval()(**inputs))[:, LENGTH:]  # theirs answers for the rows too
    assert both.difference(ours, wanted) < 1e-12
    both.loss(ours).backward()
    both.loss(wanted).backward()
    for full, value in pairs.items():
        if value.grad is None or not bool(value.grad.any()):
            assert "bias_hh" in full, full
            continue
        assert both.difference(program.table[full].tensor.grad, value.grad) < 1e-9, full


def test_peft_s_prompt_starts_standard_normal_and_ours_as_the_paper_says(both: Any) -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=50)
    theirs = encoder(both.wrap("gpt2", config, F64)).embedding.weight
    ours = zoo.traced("gpt2").apply(Prompt(length=50)).table["transformer.wte.prompt"].tensor
    assert float(theirs.std().detach()) == pytest.approx(1.0, abs=0.1)
    assert float(ours.abs().max().detach()) <= 0.5


def test_peft_puts_rows_before_padding_and_counts_it_as_distance(both: Any) -> None:
    """In a batch that is padded on the left, its rows stand in front of the padding: answers depend on how much."""
    theirs = both.wrap("llama", CASES["prompt"][1]("CAUSAL_LM"), F64).to(F64).eval()
    program = zoo.traced("llama", "sdpa", F64).apply(Prompt(length=LENGTH))
    randomised(encoder(theirs))
    with torch.no_grad():
        program.table["model.embed_tokens.prompt"].tensor.copy_(encoder(theirs).embedding.weight)
    ids = torch.randint(3, zoo.VOCAB, (1, 6))
    padded = {"input_ids": nn.functional.pad(ids, (3, 0)), "attention_mask": (torch.arange(9) >= 3).long()[None]}
    alone = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    net = program.module().eval()
    ours = [net(**padded).logits[:, 3:], net(**alone).logits]
    wanted = [theirs(**padded).logits[:, LENGTH + 3 :], theirs(**alone).logits[:, LENGTH:]]
    assert both.difference(ours[1], wanted[1]) < 1e-12
    assert both.difference(*ours) < 1e-6
    assert both.difference(*wanted) > 1e-3


def adaption(both: Any, name: str) -> tuple[Any, pg.Program]:
    """peft's LLaMA-Adapter on every layer, and our program at its values."""
    config = peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=LENGTH, adapter_layers=zoo.LAYERS)
    theirs = both.wrap(name, config, F64).to(F64).eval()
    program = zoo.traced(name, "sdpa", F64).apply(ZeroInitPrefix(length=LENGTH, gate="layer"))
    torch.manual_seed(3)
    wanted = [(n, p) for n, p in theirs.named_parameters() if "adaption_" in n]
    ours = list(program.table.trainable.items())
    assert len(wanted) == len(ours) == 2 * zoo.LAYERS
    with torch.no_grad():
        for leaf, other in (("prefix", "adaption_prompt"), ("gate", "adaption_gate")):
            mine = [p for n, p in ours if n.endswith(leaf)]
            for a, (_, b) in zip(mine, [one for one in wanted if one[0].endswith(other)], strict=True):
                b.copy_(0.5 * torch.randn_like(b))
                a.copy_(b.reshape(a.shape))
    return theirs, program


def test_llama_adapter_is_peft_s(both: Any) -> None:
    theirs, program = adaption(both, "llama")
    inputs = both.example("llama", F64)
    ours, wanted = both.answer(program.module().eval()(**inputs)), both.answer(theirs(**inputs))
    assert both.difference(wanted, both.answer(zoo.traced("llama", "sdpa", F64).module().eval()(**inputs))) > 1e-3
    assert both.difference(ours, wanted) < 1e-6  # its softmax is float32


def test_peft_adds_llama_adapter_behind_gpt2_s_output_projection(both: Any) -> None:
    """The rows' part of the heads has not been through the projection that the others went through."""
    theirs, program = adaption(both, "gpt2")
    inputs = both.example("gpt2", F64)
    ours, wanted = both.answer(program.module().eval()(**inputs)), both.answer(theirs(**inputs))
    assert both.difference(ours, wanted) > 1e-3
