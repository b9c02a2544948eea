"""Models that hold projections of bitsandbytes are traced and adapted as they are."""

from __future__ import annotations

import copy
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import peft
import pytest
import torch
import transformers
from torch import nn

import peftgraph as pg
from peftgraph.passes import DoRA, LoRA, QLoRA, Quantise

EVERY = "attention.*|ffn.*"
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 8, 9, 7]])


def quantised(model: nn.Module, bits: int, compute: torch.dtype | None = torch.bfloat16) -> nn.Module:
    """A model with its projections replaced, as transformers does it; the head stays."""
    for name, child in model.named_children():
        if not isinstance(child, nn.Linear):
            quantised(child, bits, compute)
        elif name != "lm_head":
            sizes = (child.in_features, child.out_features, child.bias is not None)
            value = child.weight.detach().clone()
            if bits == 4:
                made: Any = bnb.nn.Linear4bit(*sizes, compute_dtype=compute, quant_type="nf4")
                made.weight = bnb.nn.Params4bit(value, False, quant_type="nf4", module=made)
            else:
                made = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=6.0)
                made.weight = bnb.nn.Int8Params(value, False)
            made.bias = child.bias
            setattr(model, name, made.to("cpu"))
    return model


@cache
def llama(bits: int = 0) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
    model = transformers.LlamaForCausalLM(config)
    return quantised(model, bits) if bits else model


@cache
def program(bits: int) -> pg.Program:
    return pg.trace(llama(bits), {"input_ids": IDS})


@pytest.mark.fast
def test_four_bits_are_traced_to_the_bit() -> None:
    model, traced = llama(4), program(4)
    assert "linear(%0.norm.0, %0.attention.q.dequantise) in bf16" in traced.text()
    assert len(traced.sites.select(EVERY)) == 7
    assert len(traced.table.quantised) == 7
    tuned = traced.apply(LoRA(at=EVERY, rank=2))
    for training in (True, False):
        ours, theirs = (one.train(training)(input_ids=IDS).logits for one in (tuned.module(), model))
        assert torch.equal(ours, theirs)
    assert type(model.get_submodule("model.layers.0.mlp.up_proj")) is bnb.nn.Linear4bit


def test_it_is_what_the_pass_makes_of_the_same_weights(tmp_path: Path) -> None:
    passes = (LoRA(at=EVERY, rank=2),)
    ours = program(4).apply(*passes)
    with torch.no_grad():
        for value in ours.table.trainable.values():
            value.add_(0.1 * torch.randn_like(value))
    theirs = pg.trace(llama(), {"input_ids": IDS}).apply(Quantise())
    codes = {name: value for name, value in theirs.table.hashes().items() if "weight_" in name}
    assert codes.items() <= ours.table.hashes().items()
    loaded = theirs.apply(*passes)
    with torch.no_grad():
        for name, value in loaded.table.trainable.items():
            value.copy_(ours.table[name].tensor)
    outputs = [one.module().eval()(input_ids=IDS).logits for one in (ours, loaded)]
    assert torch.equal(*outputs)
    again = program(4).load_adapter(ours.save_adapter(tmp_path / "adapter"))
    assert torch.equal(again.module().eval()(input_ids=IDS).logits, outputs[0])


@pytest.mark.parametrize("bits", [4, 8])
def test_it_trains_starts_and_folds(bits: int) -> None:
    traced = program(bits)
    base = traced.module().eval()(input_ids=IDS).logits
    tuned = traced.apply(DoRA(at="attention.q", rank=2), LoRA(at="ffn.up", rank=2, init="pissa"))
    torch.testing.assert_close(tuned.module().eval()(input_ids=IDS).logits, base, rtol=0, atol=2e-7)
    net = tuned.module().train()
    net(input_ids=IDS).logits.square().mean().backward()
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)
    with pytest.raises(pg.QuantisedWeights, match=r"7 weight\(s\) are stored as codes"):
        pg.fold(tuned)
    folded = pg.fold(tuned, quantised="dequantise")
    assert not folded.table.quantised
    assert "dequantise" not in folded.text()
    name = "model.layers.0.self_attn.k_proj.weight"
    assert torch.equal(folded.table[name].tensor, traced.table.value(name))
    with pytest.raises(pg.PeftGraphError, match="No pass of this program made its codes"):
        pg.fold(tuned, quantised="requantise")
    assert tuned.remove().remove().text() == traced.text()


def plain_tuned(quantise: Quantise) -> pg.Program:
    """A recipe that quantises, on the model without codes, with trained values."""
    tuned = pg.trace(llama(), {"input_ids": IDS}, verify="off").apply(quantise, LoRA(at=EVERY, rank=2))
    with torch.no_grad():
        for value in tuned.table.trainable.values():
            value.add_(0.1 * torch.randn_like(value))
    return tuned


def test_an_adapter_that_quantises_is_loaded_onto_a_model_with_the_codes(tmp_path: Path) -> None:
    tuned = plain_tuned(Quantise())
    loaded = program(4).load_adapter(tuned.save_adapter(tmp_path / "adapter"))
    outputs = [one.module().eval()(input_ids=IDS).logits for one in (loaded, tuned)]
    assert torch.equal(*outputs)
    assert loaded.recipe == tuned.recipe
    assert len(loaded.table.quantised) == 7
    assert loaded.remove(0).text() == loaded.text()
    again = program(4).load_adapter(loaded.save_adapter(tmp_path / "again"))
    assert torch.equal(again.module().eval()(input_ids=IDS).logits, outputs[0])
    folded = pg.fold(loaded, quantised="dequantise")
    assert not folded.table.quantised
    both = program(4).apply(QLoRA(rank=2))
    assert both.count().trainable > 0
    with pytest.raises(pg.NoMatch):
        program(4).apply(Quantise(at="conv"))


def test_a_model_with_codes_of_a_part_gets_the_others(tmp_path: Path) -> None:
    tuned = plain_tuned(Quantise(at=f"{EVERY}|head"))
    loaded = program(4).load_adapter(tuned.save_adapter(tmp_path / "adapter"))
    assert len(loaded.table.quantised) == 8
    assert torch.equal(*(one.module().eval()(input_ids=IDS).logits for one in (loaded, tuned)))
    assert loaded.remove(0).text() == program(4).apply(LoRA(at=EVERY, rank=2)).text()


@pytest.mark.parametrize(
    ("bits", "method", "words"),
    [
        (
            4,
            Quantise(format="fp4"),
            r"4-bit codes \(fp4\) in blocks of 64.*is stored as 4-bit codes \(nf4\) in blocks of 64",
        ),
        (4, Quantise(block=128), "in blocks of 128, .*in blocks of 64"),
        (4, Quantise(double=False), "with constants of float32.*with constants of 8 bits"),
        (4, Quantise(format="int8"), r"int8 codes by row.*4-bit codes \(nf4\)"),
        (8, Quantise(), r"4-bit codes \(nf4\).*int8 codes by row"),
    ],
)
def test_other_codes_are_refused(bits: int, method: Quantise, words: str) -> None:
    with pytest.raises(pg.Conflict, match=f"{words}.* Load the model in that format, or without codes"):
        program(bits).apply(method)


def test_eight_bits_are_satisfied_by_eight_bits() -> None:
    assert program(8).apply(Quantise(format="int8")).text() == program(8).text()


def test_eight_bits_quantise_the_weight_alone() -> None:
    """As the module does while it trains; in evaluation it quantises its inputs too, which is a little away."""
    model, net = llama(8), program(8).module()
    training = [one.train()(input_ids=IDS).logits for one in (net, model)]
    torch.testing.assert_close(*training, rtol=0, atol=1e-6)
    evaluation = [one.eval()(input_ids=IDS).logits for one in (net, model)]
    assert 0 < float((evaluation[0] - evaluation[1]).detach().abs().max()) < 1e-2


def test_half_precision_beside_other_products() -> None:
    """Weights that were quantised from bfloat16 in a model of float32 multiply in float32, unrounded."""
    model = nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 32), nn.Tanh(), nn.LayerNorm(32))
    half = quantised(nn.Sequential(model[0].to(torch.bfloat16)), 4, None)
    half[0].bias = nn.Parameter(half[0].bias.float(), requires_grad=False)  # pyright: ignore
    mixed = nn.Sequential(half[0], *model[1:])
    x = torch.randn(3, 32)
    traced = pg.trace(mixed, (x,))
    assert "f32[48, 32] = dequantise_4bit" in traced.text()
    assert torch.equal(traced.module().eval()(x), mixed.eval()(x))


def test_what_cannot_be_traced() -> None:
    fresh = nn.Sequential(bnb.nn.Linear4bit(8, 8), nn.Tanh())
    with pytest.raises(pg.TraceError, match="is not quantised yet"):
        pg.trace(fresh, (torch.randn(2, 8),))
    with pytest.raises(pg.PeftGraphError, match="is stored as codes, which a plain model does not hold"):
        program(4).write_back(llama())
    with pytest.raises(pg.TraceError, match="trace it as a whole"):
        pg.trace(llama(4), {"input_ids": IDS}, root="model")


def test_outputs_are_those_of_peft_on_bitsandbytes(tmp_path: Path) -> None:
    """QLoRA as it is done elsewhere: peft's adapter on the quantised model, from files that are written here."""
    tuned = pg.trace(llama(), {"input_ids": IDS}, verify="off").apply(Quantise(), LoRA(rank=4, alpha=8.0))
    with torch.no_grad():
        for value in tuned.table.trainable.values():
            value.add_(0.1 * torch.randn_like(value))
    folder = tuned.save_adapter(tmp_path / "adapter", format="peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft asks transformers by an old name
        theirs = peft.PeftModel.from_pretrained(quantised(copy.deepcopy(llama()), 4), str(folder)).eval()
    ours = tuned.module().eval()(input_ids=IDS).logits
    torch.testing.assert_close(ours, theirs(input_ids=IDS).logits, rtol=0, atol=1e-6)
