"""One adapter in two libraries: the same base, the same A, B and l values, ours and huggingface/peft's."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import peft
import pytest
import torch
import transformers
import zoo
from torch import Tensor, nn

import peftgraph as pg
from peftgraph.authoring import Pass

WIDE = {"vocab_size": zoo.VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
EXTRA: dict[str, tuple[str, dict[str, Any]]] = {  # families that only these tests need
    "opt": (
        "OPT",
        {
            "hidden_size": 48,
            "ffn_dim": 80,
            "num_hidden_layers": 1,
            "num_attention_heads": 6,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 48,
        },
    ),
    "bart": (
        "Bart",
        {
            "d_model": 48,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 6,
            "decoder_attention_heads": 6,
            "encoder_ffn_dim": 80,
            "decoder_ffn_dim": 80,
            "max_position_embeddings": 64,
        },
    ),
    "falcon": (
        "Falcon",
        {
            "hidden_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 6,
            "multi_query": True,
            "bias": True,
        },
    ),
}
CLASSES = {"opt": "OPTForCausalLM", "bart": "BartForConditionalGeneration", "falcon": "FalconForCausalLM"}
LEAVES = {  # ours -> theirs; an embedding has two names of its own
    "lora_A": ("lora_A.default.weight", "lora_embedding_A.default"),
    "lora_B": ("lora_B.default.weight", "lora_embedding_B.default"),
    "ia3_l": ("ia3_l.default",),
    "bias": ("base_layer.bias", "bias"),
    "dora_m": ("lora_magnitude_vector.default.weight",),
}


def build(name: str, dtype: torch.dtype) -> nn.Module:
    """A small random model; equal calls give equal weights."""
    if name not in EXTRA:
        return zoo.build(name, dtype=dtype)
    family, sizes = EXTRA[name]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = getattr(transformers, f"{family}Config")(**WIDE, **sizes)
        model = getattr(transformers, CLASSES[name])(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype)


def example(name: str, dtype: torch.dtype) -> dict[str, Any]:
    """Inputs for a model."""
    inputs = zoo.example(name, dtype=dtype)
    if name == "bart":
        inputs["decoder_input_ids"] = torch.randint(3, zoo.VOCAB, (3, 5))
    return inputs


@cache
def traced(name: str, dtype: torch.dtype) -> pg.Program:
    """Our program of the same model."""
    return zoo.traced(name, dtype=dtype) if name in zoo.NAMES else pg.trace(build(name, dtype), example(name, dtype))


def answer(output: Any) -> Tensor:
    """The logits, or the hidden states of a model without a head."""
    return output["logits"] if "logits" in output else output["last_hidden_state"]


@dataclass
class Pair:
    """One model with the same adapter, in both libraries.

    Attributes:
        tuned, net: ours, as a program and as its module.
        theirs: the peft model.
        shared: our parameters beside peft's, by our names; a vector of peft may have one more dimension.
        inputs: what both are called with.
    """

    tuned: pg.Program
    net: nn.Module
    theirs: Any
    shared: dict[str, tuple[nn.Parameter, nn.Parameter]]
    inputs: dict[str, Any]

    def outputs(self) -> tuple[Tensor, Tensor]:
        """The answers of both."""
        return answer(self.net(**self.inputs)), answer(self.theirs(**self.inputs))

    def gradients(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Name, our gradient and peft's in our shape, after a backward pass of one loss through both."""
        for parameters in self.shared.values():
            for parameter in parameters:
                parameter.grad = None
        for output in self.outputs():
            loss(output).backward()
        for name, (ours, theirs) in self.shared.items():
            assert ours.grad is not None, name
            assert theirs.grad is not None, name
            yield name, ours.grad, theirs.grad.reshape(ours.shape)


def loss(output: Tensor) -> Tensor:
    """The distance to a fixed random target: a norm before the output leaves a gradient everywhere."""
    target = torch.randn(output.shape, generator=torch.Generator().manual_seed(4), dtype=output.dtype)
    return (output - target).square().sum()


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference over the largest magnitude."""
    assert ours.shape == theirs.shape
    ours, theirs = ours.detach(), theirs.detach()
    return float((ours - theirs).abs().max() / theirs.abs().max())


def wrap(name: str, config: peft.PeftConfig, dtype: torch.dtype) -> Any:
    """peft's model on a fresh base, in eval mode."""
    return peft.get_peft_model(build(name, dtype), config).eval()


def tune(name: str, method: Pass, config: peft.PeftConfig, dtype: torch.dtype = torch.float64) -> Pair:
    """Applies the method in both libraries and fills both with the same random values."""
    tuned = traced(name, dtype).apply(method)
    theirs = wrap(name, config, dtype)
    generator = torch.Generator().manual_seed(1)
    slots = dict(theirs.named_parameters())
    shared: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
    with torch.no_grad():
        for name_, ours in tuned.table.trainable.items():
            other = _other_name(name_, slots)
            noise = 0.2 * torch.randn(ours.shape, generator=generator, dtype=torch.float64)
            ours.copy_(noise + (1 if name_.endswith("ia3_l") else 0))
            slots[other].copy_(ours.reshape(slots[other].shape))
            shared[name_] = (ours, slots[other])
    theirs_trainable = {id(p) for p in theirs.parameters() if p.requires_grad}
    assert theirs_trainable == {id(p) for _, p in shared.values()}, "the two libraries adapt different places"
    torch.manual_seed(2)
    return Pair(tuned, tuned.module().eval(), theirs, shared, example(name, dtype))


def _other_name(name: str, slots: Mapping[str, nn.Parameter]) -> str:
    path, _, leaf = name.rpartition(".")
    found = [other for end in LEAVES[leaf] if (other := f"base_model.model.{path}.{end}") in slots]
    assert len(found) == 1, f"peft has no parameter for {name}"
    return found[0]


@dataclass(frozen=True)
class Tools:
    """The functions of this file, for the tests beside it."""

    tune: Callable[..., Pair] = tune
    wrap: Callable[..., Any] = wrap
    build: Callable[..., nn.Module] = build
    example: Callable[..., dict[str, Any]] = example
    traced: Callable[..., pg.Program] = traced
    answer: Callable[..., Tensor] = answer
    loss: Callable[..., Tensor] = loss
    difference: Callable[..., float] = difference


@pytest.fixture(scope="session")
def both() -> Tools:
    """`both.tune(name, method, config)` and its helpers."""
    return Tools()
