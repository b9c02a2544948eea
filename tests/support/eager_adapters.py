"""Adapter methods written out in plain PyTorch on the original models, as forward hooks. For tests only.

Each function takes the sublayer's own values and the adapter's parameters by their short names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import zoo
from torch import Tensor, nn
from torch.nn.functional import gelu, relu

Params = Mapping[str, Tensor]
STACKS = ("encoder", "decoder")

# Sublayers: the module whose output is the branch before its dropout, and the path of the sublayer's own parameters.
SUBLAYERS = {
    "bert": [
        ("encoder.layer.{i}.attention.output.dense", "encoder.layer.{i}.attention.attention"),
        ("encoder.layer.{i}.output.dense", "encoder.layer.{i}.ffn"),
    ],
    "llama": [
        ("model.layers.{i}.self_attn", "model.layers.{i}.self_attn.attention"),
        ("model.layers.{i}.mlp", "model.layers.{i}.mlp.ffn"),
    ],
    "mixtral": [
        ("model.layers.{i}.self_attn", "model.layers.{i}.self_attn.attention"),
        ("model.layers.{i}.mlp", "model.layers.{i}.mlp.experts.ffn"),
    ],
    "gpt2": [
        ("transformer.h.{i}.attn", "transformer.h.{i}.attn.attention"),
        ("transformer.h.{i}.mlp", "transformer.h.{i}.mlp.ffn"),
    ],
    "gpt_neox": [
        ("gpt_neox.layers.{i}.attention", "gpt_neox.layers.{i}.attention.attention"),
        ("gpt_neox.layers.{i}.mlp", "gpt_neox.layers.{i}.mlp.ffn"),
    ],
    "vit": [
        ("vit.layers.{i}.attention", "vit.layers.{i}.attention.attention"),
        ("vit.layers.{i}.mlp", "vit.layers.{i}.mlp.ffn"),
    ],
    "nano": [("stack.{i}.out", "stack.{i}.attention"), ("stack.{i}.proj", "stack.{i}.ffn")],
    "t5": [
        ("encoder.block.{i}.layer.0.SelfAttention", "encoder.block.{i}.layer.0.SelfAttention.attention"),
        ("encoder.block.{i}.layer.1.DenseReluDense", "encoder.block.{i}.layer.1.DenseReluDense.ffn"),
        ("decoder.block.{i}.layer.0.SelfAttention", "decoder.block.{i}.layer.0.SelfAttention.attention"),
        ("decoder.block.{i}.layer.1.EncDecAttention", "decoder.block.{i}.layer.1.EncDecAttention.cross_attention"),
        ("decoder.block.{i}.layer.2.DenseReluDense", "decoder.block.{i}.layer.2.DenseReluDense.ffn"),
    ],
}

BERT = SUBLAYERS["bert"]
CLIP = [
    ("encoder.layers.{i}.self_attn", "encoder.layers.{i}.self_attn.attention"),
    ("encoder.layers.{i}.mlp", "encoder.layers.{i}.mlp.ffn"),
]
SEQ2SEQ = [
    *((f"{stack}.layers.{{i}}.self_attn", f"{stack}.layers.{{i}}.self_attn.attention") for stack in STACKS),
    ("decoder.layers.{i}.encoder_attn", "decoder.layers.{i}.encoder_attn.cross_attention"),
    *((f"{stack}.layers.{{i}}.fc2", f"{stack}.layers.{{i}}.ffn") for stack in STACKS),
]
SUBLAYERS |= {
    "minilm": BERT,
    "roberta": BERT,
    "deberta": BERT,
    "falcon": [
        ("transformer.h.{i}.self_attention", "transformer.h.{i}.self_attention.attention"),
        ("transformer.h.{i}.mlp", "transformer.h.{i}.mlp.ffn"),
    ],
    "gemma2": [  # whose branches have norms of their own
        ("model.layers.{i}.post_attention_layernorm", "model.layers.{i}.self_attn.attention"),
        ("model.layers.{i}.post_feedforward_layernorm", "model.layers.{i}.mlp.ffn"),
    ],
    "bart": SEQ2SEQ,
    "whisper": SEQ2SEQ,
    "clip_text": CLIP,
    "clip_vision": CLIP,
}

# Feed-forwards: the module that reads what the feed-forward reads, and the one that gives the block's residual sum;
# in a post-norm block the second is the norm, which takes that sum.
FEEDFORWARDS = {
    "bert": {"encoder.layer.{i}.ffn": ("encoder.layer.{i}.intermediate", "encoder.layer.{i}.output.LayerNorm")},
    "llama": {"model.layers.{i}.mlp.ffn": ("model.layers.{i}.mlp", "model.layers.{i}")},
    "mixtral": {"model.layers.{i}.mlp.experts.ffn": ("model.layers.{i}.mlp", "model.layers.{i}")},
    "gpt2": {"transformer.h.{i}.mlp.ffn": ("transformer.h.{i}.mlp", "transformer.h.{i}")},
    "gpt_neox": {"gpt_neox.layers.{i}.mlp.ffn": ("gpt_neox.layers.{i}.mlp", "gpt_neox.layers.{i}")},
    "vit": {"vit.layers.{i}.mlp.ffn": ("vit.layers.{i}.mlp", "vit.layers.{i}")},
    "nano": {"stack.{i}.ffn": ("stack.{i}.fc", "stack.{i}")},
    "t5": {
        f"{stack}.block.{{i}}.layer.{n}.DenseReluDense.ffn": (
            f"{stack}.block.{{i}}.layer.{n}.DenseReluDense",
            f"{stack}.block.{{i}}.layer.{n}",
        )
        for stack, n in (("encoder", 1), ("decoder", 2))
    },
}
CLIP_FFN = {"encoder.layers.{i}.mlp.ffn": ("encoder.layers.{i}.mlp", "encoder.layers.{i}")}
FEEDFORWARDS |= {
    "minilm": FEEDFORWARDS["bert"],
    "roberta": FEEDFORWARDS["bert"],
    "deberta": FEEDFORWARDS["bert"],
    "falcon": {"transformer.h.{i}.mlp.ffn": ("transformer.h.{i}.mlp", "transformer.h.{i}")},
    "gemma2": FEEDFORWARDS["llama"],
    "bart": {
        f"{stack}.layers.{{i}}.ffn": (f"{stack}.layers.{{i}}.fc1", f"{stack}.layers.{{i}}.final_layer_norm")
        for stack in STACKS
    },
    "whisper": {
        f"{stack}.layers.{{i}}.ffn": (f"{stack}.layers.{{i}}.fc1", f"{stack}.layers.{{i}}") for stack in STACKS
    },
    "clip_text": CLIP_FFN,
    "clip_vision": CLIP_FFN,
}


def bottleneck(x: Tensor, p: Params, act: Any) -> Tensor:
    """W_up act(W_down x + b_down) + b_up."""
    return act(x @ p["down_weight"].T + p["down_bias"]) @ p["up_weight"].T + p["up_bias"]


def kronecker(p: Params, side: str, rule: Tensor) -> Tensor:
    """sum_i A_i (x) (s_i t_i), formed: (I, O)."""
    factors = [left @ right for left, right in zip(p[f"{side}_left"], p[f"{side}_right"], strict=True)]
    return torch.stack([torch.kron(a, w) for a, w in zip(rule, factors, strict=True)]).sum(0)


def hypercomplex(x: Tensor, p: Params, rule: Tensor) -> Tensor:
    """The bottleneck of Compacter."""
    narrow = gelu(x @ kronecker(p, "down", rule) + p["down_bias"], approximate="tanh")
    return narrow @ kronecker(p, "up", rule) + p["up_bias"]


def serial(word: str, h: Tensor, p: Params, adapters: Params) -> Tensor:
    """What a serial method adds to the sublayer's output h."""
    if word == "compacter":
        return hypercomplex(h, p, adapters["compacter.phm_rule"])
    return bottleneck(h, p, gelu)


def own(adapters: Params, owner: str, word: str) -> dict[str, Tensor]:
    """The parameters of one method at one sublayer, by their short names."""
    prefix = f"{owner}_{word}."
    return {key.removeprefix(prefix): value for key, value in adapters.items() if key.startswith(prefix)}


def hooks(name: str, model: nn.Module, adapters: Params) -> Iterator[Any]:
    """Puts the adapters that `adapters` holds on `model`; yields the handles."""
    for i in range(zoo.LAYERS):
        for module, owner in SUBLAYERS[name]:
            for word in ("serial_adapter", "houlsby", "compacter"):
                p = own(adapters, owner.format(i=i), word)
                if p:
                    change = _changer(lambda h, word=word, p=p: h + serial(word, h, p, adapters))
                    yield model.get_submodule(module.format(i=i)).register_forward_hook(change)
        outputs = {owner: module for module, owner in SUBLAYERS[name]}
        for owner, (reader, end) in FEEDFORWARDS[name].items():
            places = [path.format(i=i) for path in (reader, outputs[owner], end)]
            yield from _beside(model, places[:2], own(adapters, owner.format(i=i), "parallel_adapter"))
            yield from _on_the_sum(model, places[2], own(adapters, owner.format(i=i), "pfeiffer"))


def _beside(model: nn.Module, places: list[str], p: Params) -> Iterator[Any]:
    if not p:
        return
    read: list[Tensor] = []
    reader, output = (model.get_submodule(place) for place in places)
    yield reader.register_forward_pre_hook(lambda _m, arguments: read.append(arguments[0]))
    yield output.register_forward_hook(_changer(lambda h: h + p["scale"] * bottleneck(read.pop(), p, relu)))


def _on_the_sum(model: nn.Module, end: str, p: Params) -> Iterator[Any]:
    if not p:
        return
    module = model.get_submodule(end)
    if isinstance(module, nn.LayerNorm):  # a post-norm block: the norm once for the adapter and once behind it
        norm = nn.functional.layer_norm
        settings = (module.normalized_shape, module.weight, module.bias, module.eps)
        yield module.register_forward_pre_hook(lambda _m, s: (s[0] + bottleneck(norm(s[0], *settings), p, relu),))
    else:
        yield module.register_forward_hook(_changer(lambda s: s + bottleneck(s, p, relu)))


def _changer(change: Any) -> Any:
    """A hook that changes a module's output, or the first of several."""

    def hook(_module: nn.Module, _arguments: Any, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    return hook
