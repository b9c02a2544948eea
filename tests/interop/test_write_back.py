"""Merged weights go into a plain model, which its own library saves and loads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import zoo
from torch import nn

import peftgraph as pg
from peftgraph.passes.lora import LoRA


def tune(name: str, at: str) -> pg.Program:
    return zoo.randomise(zoo.traced(name).apply(LoRA(at=at, rank=2)))


def logits(model: nn.Module) -> torch.Tensor:
    torch.manual_seed(3)
    with torch.no_grad():
        return model(**zoo.example("llama", 2, 5)).logits


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def reload(model: nn.Module, folder: Path) -> nn.Module:
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder).eval()


def test_round_trip_of_a_tied_model(tmp_path: Path) -> None:
    folded = pg.fold(tune("llama", "attention.q|attention.v"))
    model = folded.write_back(zoo.build("llama"))
    assert model.get_parameter("lm_head.weight") is model.get_parameter("model.embed_tokens.weight")
    assert model.config.tie_word_embeddings
    assert torch.equal(logits(model), logits(folded.module().eval()))
    assert torch.equal(logits(reload(model, tmp_path)), logits(model))


def test_a_tie_that_is_cut(tmp_path: Path) -> None:
    folded = pg.fold(tune("llama", "head"), untie=True)
    model = folded.write_back(zoo.build("llama"))
    assert model.config.tie_word_embeddings is False
    assert torch.equal(logits(model), logits(folded.module().eval()))
    assert not torch.equal(logits(model), logits(zoo.build("llama")))
    assert torch.equal(logits(reload(model, tmp_path)), logits(model))


def test_the_traced_model_itself_may_be_given() -> None:
    model = zoo.build("nano")
    program = pg.trace(model, zoo.example("nano"))
    tuned = zoo.randomise(program.apply(LoRA(at="attention.*", rank=2)))
    before, inputs = program.table.hashes(), zoo.example("nano")
    expected = tuned.module().eval()(**inputs)["logits"]
    assert pg.fold(tuned).write_back(model) is model
    torch.testing.assert_close(model(**inputs)["logits"], expected, rtol=1e-4, atol=1e-5)
    assert program.table.hashes() == before
    assert torch.equal(tuned.module().eval()(**inputs)["logits"], expected)


def refused(program: pg.Program, model: nn.Module, words: str) -> None:
    before = {name: (t.shape, t.dtype) for name, t in model.state_dict().items()}
    values = None if any(t.device.type == "meta" for t in model.state_dict().values()) else snapshot(model)
    with pytest.raises(pg.PeftGraphError, match=words):
        program.write_back(model)
    assert {name: (t.shape, t.dtype) for name, t in model.state_dict().items()} == before
    if values is not None:
        assert all(torch.equal(t, values[name]) for name, t in model.state_dict().items())


def test_refusals_leave_the_model_alone() -> None:
    tuned = tune("nano", "attention.q")
    folded = pg.fold(tuned)
    refused(tuned, zoo.build("nano"), r"Fold the program first: lora\{at=attention.q rank=2.*would be lost")
    refused(folded, zoo.Nano(width=36), r"tok.weight has shape \(61, 36\) in the model, \(61, 48\) in the program")
    refused(folded, zoo.Nano(layers=1), r"The model has no stack.1.n1.weight; it is not the Nano that was traced")
    refused(folded, zoo.Nano(layers=3), "The model has stack.2.n1.weight, which the Nano that was traced has not")
    refused(folded, zoo.build("nano", dtype=torch.bfloat16), r"bfloat16 in the model .*rounded again.*model.to\(")
    refused(folded, zoo.Nano().to("meta"), "tok.weight is on the meta device and has no values")


def test_another_class_of_the_same_parameters() -> None:
    class Other(zoo.Nano):
        pass

    refused(pg.fold(tune("nano", "attention.q")), Other(), "The model is a Other; a Nano was traced")
