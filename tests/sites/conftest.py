"""Tiny models of many families, and the sites found in them (traced once for each implementation)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache

import pytest
import torch
import transformers
from torch import nn

from peftgraph.capture import capture
from peftgraph.sites import Sites, find_sites
from peftgraph.sites.roles import BY_NAME

B, S, T = 3, 7, 5
PLAIN = {
    "vocab_size": 99,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**PLAIN, "num_key_value_heads": 2}
GPT2 = {"vocab_size": 99, "n_embd": 48, "n_layer": 2, "n_head": 6, "n_positions": 64}
GPT2 |= {"bos_token_id": 1, "eos_token_id": 2}
T5 = {"vocab_size": 99, "d_model": 48, "d_ff": 80, "d_kv": 8, "num_layers": 2, "num_heads": 6}
T5 |= {"decoder_start_token_id": 0}
BART = {
    "vocab_size": 99,
    "d_model": 48,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "max_position_embeddings": 64,
}
BART |= {
    "encoder_attention_heads": 6,
    "decoder_attention_heads": 6,
    "encoder_ffn_dim": 80,
    "decoder_ffn_dim": 80,
}
VIT = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 6}
VIT |= {"image_size": 24, "patch_size": 8, "num_labels": 5}
FALCON = {"vocab_size": 99, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6}
FALCON |= {"bos_token_id": 1, "eos_token_id": 2}

ZOO: dict[str, tuple[str, dict[str, object]]] = {
    "BertModel": ("BertConfig", PLAIN),
    "AlbertModel": ("AlbertConfig", {**PLAIN, "embedding_size": 24}),
    "LlamaForCausalLM": ("LlamaConfig", {**GROUPED, "tie_word_embeddings": True, "attention_dropout": 0.1}),
    "Gemma2ForCausalLM": (
        "Gemma2Config",
        {**GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16},
    ),
    "Phi3ForCausalLM": ("Phi3Config", GROUPED),
    "CohereForCausalLM": ("CohereConfig", GROUPED),
    "GPT2LMHeadModel": ("GPT2Config", GPT2),
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", PLAIN),
    "FalconForCausalLM": ("FalconConfig", {**FALCON, "multi_query": True, "parallel_attn": True}),
    "MixtralForCausalLM": ("MixtralConfig", {**GROUPED, "num_local_experts": 4}),
    "T5ForConditionalGeneration": ("T5Config", T5),
    "BartForConditionalGeneration": ("BartConfig", BART),
    "ViTForImageClassification": ("ViTConfig", VIT),
}


def model_of(name: str, attention: str = "eager", **changes: object) -> nn.Module:
    config, sizes = ZOO[name]
    settings = {**sizes, **changes, "attn_implementation": attention}
    torch.manual_seed(0)
    return getattr(transformers, name)(getattr(transformers, config)(**settings))


def example_of(name: str) -> dict[str, object]:
    if name.startswith("ViT"):
        return {"pixel_values": torch.randn(B, 3, 24, 24)}
    example: dict[str, object] = {
        "input_ids": torch.randint(3, 99, (B, S)),
        "attention_mask": torch.ones(B, S, dtype=torch.long),
    }
    if name.endswith("ConditionalGeneration"):
        example["decoder_input_ids"] = torch.randint(3, 99, (B, T))
    if name.endswith(("CausalLM", "LMHeadModel", "ConditionalGeneration")):
        example["use_cache"] = False
    return example


def trace(model: nn.Module, example: object) -> Sites:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = capture(model, example)  # pyright: ignore[reportArgumentType]
    found = find_sites(program.graph, program.table.tensors())
    for site in found:
        known = BY_NAME[site.role]
        assert site.ports.keys() | site.readers.keys() <= set(known.ports), site
        assert site.weight is None or not known.owns_weight or "weight" in known.ports, site
    return found


@cache
def _found(name: str, attention: str, changes: tuple[tuple[str, object], ...]) -> Sites:
    return trace(model_of(name, attention, **dict(changes)), example_of(name))


@pytest.fixture
def sites_of() -> Callable[..., Sites]:
    """sites_of("BertModel", "sdpa"): the sites of a family, from a cache."""

    def found(name: str, attention: str = "eager", **changes: object) -> Sites:
        return _found(name, attention, tuple(changes.items()))

    return found


@pytest.fixture
def find() -> Callable[[nn.Module, object], Sites]:
    """find(module, example): the sites of a hand-written module."""
    return trace
