"""One hand-written model beside references that are written out by hand, and real configurations without weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
import transformers
import zoo
from torch import Tensor, nn

import peftgraph as pg

F64 = torch.float64
IDS = torch.zeros(2, 8, dtype=torch.long)


@dataclass(frozen=True)
class Bench:
    """A one-layer `zoo.Nano`, its program, and a fresh copy of it to write a method into by hand."""

    program: pg.Program
    inputs: dict[str, Tensor]

    def plain(self) -> zoo.Nano:
        """The same weights, in plain PyTorch."""
        model = zoo.Nano(layers=1).to(F64).eval()
        model.load_state_dict({name: entry.tensor for name, entry in self.program.table.items()}, strict=True)
        return model.requires_grad_(False)

    def agree(
        self, tuned: pg.Program, reference: nn.Module, same: Mapping[str, Tensor], training: bool = False
    ) -> None:
        """Outputs and every gradient are equal; `same` holds the reference's parameter for each of ours, by our name.

        Both start from our values; a parameter may be shaped differently in the reference.
        """
        trainable = tuned.table.trainable
        assert same.keys() == trainable.keys()
        assert {id(p) for p in same.values()} == {id(p) for p in reference.parameters() if p.requires_grad}
        with torch.no_grad():
            for name, theirs in same.items():
                theirs.copy_(trainable[name].reshape(theirs.shape))
        outputs: list[Tensor] = []
        for module in (tuned.module(), reference):
            torch.manual_seed(3)
            outputs.append(_tensor(module.train(training)(**self.inputs)))
        close(*outputs)
        weights = torch.randn_like(outputs[0])
        for output in outputs:
            (output * weights).sum().backward()
        for name, theirs in same.items():
            ours = trainable[name].grad
            assert ours is not None, name
            assert theirs.grad is not None, name
            assert float(theirs.grad.abs().max()) > 0, name
            close(ours, theirs.grad.reshape(ours.shape))
            trainable[name].grad = None


def _tensor(output: Any) -> Tensor:
    return output["logits"] if "logits" in output else output["last_hidden_state"]


def close(ours: Tensor, theirs: Tensor) -> None:
    """Equal to 1e-12 of the largest magnitude."""
    ours, theirs = ours.detach(), theirs.detach()
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-12


@cache
def _bench(dtype: torch.dtype) -> Bench:
    torch.manual_seed(0)
    model = zoo.Nano(layers=1).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    inputs = zoo.example("nano")
    return Bench(pg.trace(model, inputs), inputs)


@pytest.fixture
def bench() -> Bench:
    """The bench in float64."""
    return _bench(F64)


@pytest.fixture
def nano() -> pg.Program:
    """The one-layer model in float32, for texts."""
    return _bench(torch.float32).program


@cache
def _real(model: str, config: str, decoder: bool, sizes: tuple[tuple[str, Any], ...]) -> pg.Program:
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        built = getattr(transformers, model)(getattr(transformers, config)(**dict(sizes)))
    inputs = {"input_ids": IDS} | ({"decoder_input_ids": IDS[:, :5]} if decoder else {})
    return pg.trace(built, inputs)


REAL: dict[str, tuple[str, str, bool, dict[str, Any]]] = {
    # name -> class, configuration, is there a decoder beside the encoder, what differs from the configuration's
    # defaults
    "bert-base": ("BertModel", "BertConfig", False, {}),
    "roberta-large": ("RobertaModel", "RobertaConfig", False, {"hidden_size": 1024, "intermediate_size": 4096,
                                                               "num_attention_heads": 16, "num_hidden_layers": 1}),
    "gpt2-medium": ("GPT2LMHeadModel", "GPT2Config", False, {"n_embd": 1024, "n_head": 16, "n_layer": 1}),
    "gpt3": ("GPT2LMHeadModel", "GPT2Config", False, {"n_embd": 12288, "n_head": 96, "n_layer": 1}),
    "llama-7b": ("LlamaForCausalLM", "LlamaConfig", False, {"num_hidden_layers": 1}),
    "t5-xl": ("T5ForConditionalGeneration", "T5Config", True,
              {"d_model": 2048, "d_ff": 5120, "num_heads": 32, "num_layers": 1, "feed_forward_proj": "gated-gelu"}),
}  # fmt: skip


@pytest.fixture(scope="session")
def real() -> Callable[[str], pg.Program]:
    """real("bert-base"): a program on the meta device; all but BERT-base have one layer a stack."""

    def program(name: str) -> pg.Program:
        model, config, decoder, sizes = REAL[name]
        return _real(model, config, decoder, tuple(sizes.items()))

    return program
