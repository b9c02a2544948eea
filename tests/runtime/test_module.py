"""A lowered module trains, copies, saves and moves as any module does."""

from __future__ import annotations

import copy

import pytest
import torch
import zoo
from torch import nn
from torch.nn import functional as F

import peftgraph as pg
from peftgraph.passes.bitfit import BitFit
from peftgraph.passes.lora import LoRA


def loss_of(net: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(net(**inputs)["logits"].flatten(0, 1), inputs["idx"].flatten())


def train(net: nn.Module, steps: int = 8) -> list[float]:
    inputs = zoo.example("nano")
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(steps):
        loss = loss_of(net, inputs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_a_plain_loop_trains_the_new_parameters_only() -> None:
    program = zoo.traced("nano")
    before = program.table.hashes()
    tuned = program.apply(LoRA(at="attention.*|ffn.*", rank=2))
    net = tuned.module().train()
    losses = train(net)
    assert losses[-1] < losses[0] - 0.2
    trained = {name for name, p in net.named_parameters() if p.grad is not None}
    assert trained == set(tuned.table.trainable)
    assert all("lora_" in name for name in trained)
    assert program.table.hashes() == before
    inputs = zoo.example("nano", 2, 4)
    assert torch.equal(net.eval()(**inputs)["logits"], tuned.module().eval()(**inputs)["logits"])
    folded = pg.fold(tuned).module().eval()
    torch.testing.assert_close(folded(**inputs), net(**inputs), rtol=1e-4, atol=1e-5)


def test_only_new_parameters_require_grad() -> None:
    tuned = zoo.traced("bert").apply(LoRA(rank=2))
    net = tuned.module()
    assert {name for name, p in net.named_parameters() if p.requires_grad} == set(tuned.table.trainable)
    assert not any(p.requires_grad for p in zoo.traced("bert").module().parameters())
    assert "trainable parameters" in repr(net)


def test_train_and_eval_switch_dropout_of_base_and_adapter() -> None:
    tuned = zoo.randomise(zoo.traced("llama").apply(LoRA(rank=2, dropout=0.5)))
    net, inputs = tuned.module(), zoo.example("llama")
    assert net.training
    assert not torch.equal(net(**inputs).logits, net(**inputs).logits)
    net.eval()
    assert torch.equal(net(**inputs).logits, net(**inputs).logits)
    assert "dropout" not in str(net._peftgraph.graph_for(training=False)[0])
    base = zoo.traced("llama").module()
    assert not torch.equal(base(**inputs).logits, base.eval()(**inputs).logits)  # attention dropout of the base


def test_deepcopy_is_independent() -> None:
    tuned = zoo.traced("nano").apply(LoRA(rank=2))
    net = tuned.module()
    inputs = zoo.example("nano")
    before = net.eval()(**inputs)["logits"]
    other = copy.deepcopy(net)
    train(other.train())
    assert torch.equal(net(**inputs)["logits"], before)
    assert not torch.equal(other.eval()(**inputs)["logits"], before)
    assert torch.equal(other.to(torch.float64).to(torch.float32)(**inputs)["logits"], other(**inputs)["logits"])


def test_deepcopy_keeps_ties() -> None:
    net = copy.deepcopy(zoo.traced("llama").module())
    assert net.get_parameter("lm_head.weight") is net.get_parameter("model.embed_tokens.weight")


def test_state_dict_has_the_names_of_the_model() -> None:
    model = zoo.build("llama")
    tuned = zoo.traced("llama").apply(LoRA(rank=2))
    net = tuned.module()
    assert set(net.state_dict()) - set(model.state_dict()) == set(tuned.table.trainable)
    assert set(zoo.traced("llama").module().state_dict()) == set(model.state_dict())
    missing, unexpected = net.load_state_dict(model.state_dict(), strict=False)
    assert set(missing) == set(tuned.table.trainable)
    assert unexpected == []
    again = tuned.module()
    again.load_state_dict(net.state_dict())


def test_two_modules_share_what_trains() -> None:
    tuned = zoo.traced("nano").apply(BitFit(), LoRA(rank=2))
    one, two = tuned.module(), tuned.module()
    train(one, steps=2)
    for name, parameter in tuned.table.trainable.items():
        assert one.get_parameter(name) is two.get_parameter(name) is parameter
    frozen = "tok.weight"
    assert one.get_parameter(frozen).data_ptr() == two.get_parameter(frozen).data_ptr()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_moved_module_still_trains_the_program(dtype: torch.dtype) -> None:
    tuned = zoo.traced("nano").apply(LoRA(at="attention.*", rank=2))
    net = tuned.module().to(dtype)
    losses = train(net, steps=4)
    assert losses[-1] < losses[0]
    folded = pg.fold(tuned)
    assert folded.table.dtype == torch.float32
    inputs = zoo.example("nano")
    merged, trained = folded.module().eval()(**inputs)["logits"], net.eval()(**inputs)["logits"]
    assert merged.dtype == torch.float32
    torch.testing.assert_close(merged, trained.float(), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("name", ["nano", "llama"])
def test_autocast_around_it_is_autocast_around_the_model(name: str) -> None:
    model, net, inputs = zoo.build(name).requires_grad_(False), zoo.traced(name).module().eval(), zoo.example(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = (zoo.leaves(module(**inputs))[0] for module in (net, model))
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)


def test_torch_compile_takes_it() -> None:
    tuned = zoo.randomise(zoo.traced("nano").apply(LoRA(rank=2)))
    net, inputs = tuned.module().eval(), zoo.example("nano")
    compiled = torch.compile(net, backend="eager", fullgraph=False)
    torch.testing.assert_close(compiled(**inputs)["logits"], net(**inputs)["logits"])
