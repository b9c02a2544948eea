"""Small random models of every architecture that the laws are held on, with example inputs of coprime sizes.

Names of modules appear nowhere in the engine; here they serve as ground truth only. `build(name, attn)` makes a model,
`example(name, batch, length)` a call of it, and `traced(name, attn)` a cached program of it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import peftgraph as pg

VOCAB, WIDTH, HEADS, LAYERS, FFN = 61, 48, 6, 2, 80


def _bert(attn: str) -> nn.Module:
    from transformers import BertConfig, BertModel

    return BertModel(
        BertConfig(
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            intermediate_size=FFN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            max_position_embeddings=64,
            attn_implementation=attn,
        )
    )


def _llama(attn: str) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            intermediate_size=FFN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            attention_dropout=0.1,
            max_position_embeddings=64,
            attn_implementation=attn,
        )
    )


def _gpt2(attn: str) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB,
            n_embd=WIDTH,
            n_layer=LAYERS,
            n_head=HEADS,
            n_positions=64,
            n_inner=FFN,
            bos_token_id=1,
            eos_token_id=2,
            attn_implementation=attn,
        )
    )


def _gpt_neox(attn: str) -> nn.Module:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            intermediate_size=FFN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            max_position_embeddings=64,
            attention_dropout=0.1,
            hidden_dropout=0.1,
            bos_token_id=1,
            eos_token_id=2,
            attn_implementation=attn,
        )
    )


def _t5(attn: str) -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCAB,
            d_model=WIDTH,
            d_ff=FFN,
            d_kv=8,
            num_layers=LAYERS,
            num_heads=HEADS,
            decoder_start_token_id=0,
            attn_implementation=attn,
        )
    )


def _vit(attn: str) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(
            hidden_size=WIDTH,
            intermediate_size=FFN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            image_size=24,
            patch_size=8,
            num_labels=5,
            attention_probs_dropout_prob=0.1,
            hidden_dropout_prob=0.1,
            attn_implementation=attn,
        )
    )


def _mixtral(attn: str) -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            intermediate_size=FFN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=2,
            num_local_experts=4,
            max_position_embeddings=64,
            attn_implementation=attn,
        )
    )


class NanoBlock(nn.Module):
    """A pre-norm block with one fused projection for q, k and v, as small teaching models write it."""

    def __init__(self, width: int, heads: int, inner: int, attn: str) -> None:
        super().__init__()
        self.heads, self.attn = heads, attn
        self.n1, self.n2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc, self.proj = nn.Linear(width, inner), nn.Linear(inner, width)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        b, s, d = x.shape
        q, k, v = (t.view(b, s, self.heads, -1).transpose(1, 2) for t in self.mix(self.n1(x)).split(d, dim=2))
        if self.attn == "sdpa":
            y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            score = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
            hidden = torch.ones(s, s, dtype=torch.bool, device=x.device).triu(1)
            y = score.masked_fill(hidden, float("-inf")).softmax(-1) @ v
        x = x + self.drop(self.out(y.transpose(1, 2).reshape(b, s, d)))
        return x + self.drop(self.proj(nn.functional.gelu(self.fc(self.n2(x)))))


class Nano(nn.Module):
    """A hand-written decoder that no library knows; `targets` is optional and adds a loss."""

    def __init__(
        self, width: int = WIDTH, heads: int = HEADS, inner: int = FFN, layers: int = LAYERS, attn: str = "sdpa"
    ) -> None:
        super().__init__()
        self.tok, self.pos = nn.Embedding(VOCAB, width), nn.Embedding(64, width)
        self.stack = nn.ModuleList(NanoBlock(width, heads, inner, attn) for _ in range(layers))
        self.last = nn.LayerNorm(width)
        self.vocab = nn.Linear(width, VOCAB, bias=False)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> dict[str, Tensor]:
        x = self.tok(idx) + self.pos(torch.arange(idx.shape[1], device=idx.device))
        for block in self.stack:
            x = block(x)
        logits = self.vocab(self.last(x))
        if targets is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()), "logits": logits}


MODELS: dict[str, Callable[[str], nn.Module]] = {
    "bert": _bert,
    "llama": _llama,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "t5": _t5,
    "vit": _vit,
    "mixtral": _mixtral,
    "nano": lambda attn: Nano(attn=attn),
}
NAMES = tuple(MODELS)
ATTENTIONS = ("sdpa", "eager")


def build(name: str, attn: str = "sdpa", dtype: torch.dtype = torch.float32) -> nn.Module:
    """A small random model in eval mode; no bias is zero and no norm weight is one, so that nothing hides."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = MODELS[name](attn).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype)


def example(
    name: str, batch: int = 3, length: int = 7, dtype: torch.dtype = torch.float32, masked: bool = True
) -> dict[str, Any]:
    """Inputs for a model; the second row is padded on the right where the model takes a mask."""
    ids = torch.randint(3, VOCAB, (batch, length))
    if name == "vit":
        return {"pixel_values": torch.randn(batch, 3, 24, 24, dtype=dtype)}
    if name == "nano":
        return {"idx": ids}
    mask = torch.ones_like(ids)
    if masked and batch > 1 and length > 2:
        mask[1, -2:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if name == "t5":
        inputs["decoder_input_ids"] = torch.randint(3, VOCAB, (batch, 5))
    return inputs


@cache
def traced(name: str, attn: str = "sdpa", dtype: torch.dtype = torch.float32) -> pg.Program:
    """The program of `build(name, attn, dtype)`; programs are values, so tests may share it."""
    return pg.trace(build(name, attn, dtype), example(name, dtype=dtype))


def leaves(output: Any) -> list[Tensor]:
    """The tensors of a model's output."""
    from torch.utils import _pytree as pytree

    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def randomise(program: pg.Program, scale: float = 0.1) -> pg.Program:
    """Moves every trainable parameter away from its start, in place; returns the program."""
    with torch.no_grad():
        for parameter in program.table.trainable.values():
            parameter.add_(scale * torch.randn_like(parameter))
    return program
