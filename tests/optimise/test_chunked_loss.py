"""A cross-entropy in chunks is the plain one, without the logits of all rows in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from alive import kept_bytes
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import peftgraph as pg
from peftgraph.optimise import chunked_loss
from peftgraph.optimise.chunked_loss import chunked_cross_entropy
from peftgraph.passes import LoRA

VOCABULARY = 401


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_values_and_gradients_are_torchs(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, reduction: str) -> None:
    monkeypatch.setattr(chunked_loss, "CHUNK_VALUES", 4 * 50)  # four rows, so that the last chunk is smaller
    torch.manual_seed(0)
    target = torch.randint(0, 50, (11,))
    target[[2, 7]] = -100
    given = [torch.randn(11, 6), torch.randn(50, 6), torch.randn(50)]
    found: list[list[Tensor]] = []
    for chunked in (False, True):
        rows, weight, bias = (one.to(dtype).requires_grad_() for one in given)
        wide = torch.promote_types(dtype, torch.float32)
        if chunked:
            loss = chunked_cross_entropy(rows, weight, bias, target, wide, 1 if reduction == "mean" else 2, -100)
        else:
            loss = F.cross_entropy(F.linear(rows, weight, bias).to(wide), target, reduction=reduction)
        found.append([loss.detach(), *torch.autograd.grad(3 * loss, (rows, weight, bias))])
    bound = {torch.float64: 1e-14, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for plain, ours in zip(*found, strict=True):
        assert float((plain - ours).abs().max()) <= bound * float(plain.abs().max())


def model(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "llama":
        return LlamaForCausalLM(
            LlamaConfig(vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                        num_attention_heads=2)
        )  # fmt: skip
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=64)
    return GPT2LMHeadModel(config)


def step(net: nn.Module, ids: Tensor) -> tuple[Any, dict[str, Tensor]]:
    net.zero_grad()
    torch.manual_seed(1)
    output: Any = net(input_ids=ids, labels=ids)
    output.loss.backward()
    return output, {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_model_trains_as_before_and_keeps_no_logits(name: str) -> None:
    ids = torch.randint(0, VOCABULARY, (3, 12))
    tuned = pg.trace(model(name), {"input_ids": ids, "labels": ids}).apply(LoRA(rank=2))
    net, plain = tuned.module(keep_logits=False).train(), tuned.module("off").train()
    ours, theirs = step(net, ids), step(plain, ids)
    assert ours[0].logits is None
    torch.testing.assert_close(ours[0].loss, theirs[0].loss)
    for key, grad in theirs[1].items():
        torch.testing.assert_close(ours[1][key], grad, rtol=1e-4, atol=1e-7)
    logits = ids.numel() * VOCABULARY * 4
    kept = kept_bytes(lambda: net(input_ids=ids, labels=ids).loss)
    assert kept <= kept_bytes(lambda: plain(input_ids=ids, labels=ids).loss) - 0.9 * logits
    assert net.eval()(input_ids=ids, labels=ids).logits.shape == (3, 12, VOCABULARY)
    assert net.train()(input_ids=ids).logits is not None  # without labels there is no loss


def test_a_head_with_an_adapter_keeps_its_logits() -> None:
    ids = torch.randint(0, VOCABULARY, (2, 5))
    tuned = pg.trace(model("llama"), {"input_ids": ids, "labels": ids}).apply(LoRA(at=pg.head, rank=2))
    net, plain = tuned.module(keep_logits=False).train(), tuned.module("off").train()
    assert torch.equal(net(input_ids=ids, labels=ids).logits, plain(input_ids=ids, labels=ids).logits)


def test_the_plain_graph_has_its_logits() -> None:
    ids = torch.randint(0, VOCABULARY, (2, 5))
    with pytest.raises(pg.PeftGraphError, match="does not go with"):
        pg.trace(model("llama"), {"input_ids": ids}).module("off", keep_logits=False)
