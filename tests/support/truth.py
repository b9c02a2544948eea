"""Ground truth by module names, and eager references built on the original model. For tests only.

`PLACES[name]` says where each role's weight lives; `eager_outputs` runs the original model's own code with adapted
weights put in by `torch.func.functional_call` (LoRA, (IA)3, BitFit) or with forward hooks (adapters, in
`eager_adapters`), so that gradients of the adapter's parameters come from a computation that shares nothing with the
engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import eager_adapters
import torch
import zoo
from torch import Tensor, nn
from torch.func import functional_call


@dataclass(frozen=True)
class Place:
    """One projection: its stored weight, the output rows that are its own, and where its new parameters stand."""

    role: str
    weight: str
    owner: str
    rows: tuple[int, ...] | None = None
    transposed: bool = False
    bias: str | None = None


def _plain(role: str, module: str, bias: bool) -> Place:
    return Place(role, f"{module}.weight", module, bias=f"{module}.bias" if bias else None)


def _separate(stem: str, names: Mapping[str, str], bias: bool) -> Iterator[Place]:
    for role, module in names.items():
        yield _plain(role, f"{stem}.{module}", bias)


def _fused(module: str, rows: Mapping[str, list[int]], transposed: bool, bias: bool = True) -> Iterator[Place]:
    for part, indices in rows.items():
        own = f"{module}.bias" if bias else None
        yield Place(f"attention.{part}", f"{module}.weight", f"{module}.{part}", tuple(indices), transposed, own)


THIRDS = {part: list(range(i * zoo.WIDTH, (i + 1) * zoo.WIDTH)) for i, part in enumerate("qkv")}
HEAD = zoo.WIDTH // zoo.HEADS
INTERLEAVED = {
    part: [head * 3 * HEAD + i * HEAD + column for head in range(zoo.HEADS) for column in range(HEAD)]
    for i, part in enumerate("qkv")
}
MULTI_QUERY = {"q": list(range(zoo.WIDTH))} | {
    part: list(range(zoo.WIDTH + i * HEAD, zoo.WIDTH + (i + 1) * HEAD)) for i, part in enumerate("kv")
}
WORDS = ("query", "key", "value")
CLIP = ""  # the towers stand alone
LLAMA_ATTENTION = {f"attention.{p}": f"self_attn.{p}_proj" for p in "qkvo"}


def _bert(i: int) -> Iterator[Place]:
    names = {
        "attention.q": "attention.self.query",
        "attention.k": "attention.self.key",
        "attention.v": "attention.self.value",
        "attention.o": "attention.output.dense",
        "ffn.up": "intermediate.dense",
        "ffn.down": "output.dense",
    }
    yield from _separate(f"encoder.layer.{i}", names, True)


def _llama(i: int) -> Iterator[Place]:
    ffn = {"ffn.gate": "mlp.gate_proj", "ffn.up": "mlp.up_proj", "ffn.down": "mlp.down_proj"}
    yield from _separate(f"model.layers.{i}", LLAMA_ATTENTION | ffn, False)


def _gpt2(i: int) -> Iterator[Place]:
    stem = f"transformer.h.{i}"
    yield from _fused(f"{stem}.attn.c_attn", THIRDS, transposed=True)
    for role, module in {"attention.o": "attn.c_proj", "ffn.up": "mlp.c_fc", "ffn.down": "mlp.c_proj"}.items():
        path = f"{stem}.{module}"
        yield Place(role, f"{path}.weight", path, transposed=True, bias=f"{path}.bias")


def _gpt_neox(i: int) -> Iterator[Place]:
    stem = f"gpt_neox.layers.{i}"
    yield from _fused(f"{stem}.attention.query_key_value", INTERLEAVED, transposed=False)
    names = {"attention.o": "attention.dense", "ffn.up": "mlp.dense_h_to_4h", "ffn.down": "mlp.dense_4h_to_h"}
    yield from _separate(stem, names, True)


def _t5(i: int) -> Iterator[Place]:
    for stack, ffn in (("encoder", 1), ("decoder", 2)):
        stem = f"{stack}.block.{i}.layer"
        kinds = [f"{stem}.0.SelfAttention"] + ([f"{stem}.1.EncDecAttention"] if stack == "decoder" else [])
        for kind in kinds:
            yield from _separate(kind, {f"attention.{p}": p for p in "qkvo"}, False)
        yield from _separate(f"{stem}.{ffn}.DenseReluDense", {"ffn.up": "wi", "ffn.down": "wo"}, False)


def _vit(i: int) -> Iterator[Place]:
    names = {f"attention.{p}": f"attention.{p}_proj" for p in "qkvo"} | {"ffn.up": "mlp.fc1", "ffn.down": "mlp.fc2"}
    yield from _separate(f"vit.layers.{i}", names, True)


def _mixtral(i: int) -> Iterator[Place]:
    yield from _separate(f"model.layers.{i}", LLAMA_ATTENTION, False)
    stacked, down = (f"model.layers.{i}.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj"))
    yield Place("ffn.gate", stacked, f"{stacked}_gate", tuple(range(zoo.FFN)))
    yield Place("ffn.up", stacked, f"{stacked}_up", tuple(range(zoo.FFN, 2 * zoo.FFN)))
    yield Place("ffn.down", down, f"{down}_down")


def _nano(i: int) -> Iterator[Place]:
    yield from _fused(f"stack.{i}.mix", THIRDS, transposed=False)
    yield from _separate(f"stack.{i}", {"attention.o": "out", "ffn.up": "fc", "ffn.down": "proj"}, True)


def _deberta(i: int) -> Iterator[Place]:
    names = {f"attention.{p}": f"attention.self.{name}_proj" for p, name in zip("qkv", WORDS, strict=True)}
    last = {"attention.o": "attention.output.dense", "ffn.up": "intermediate.dense", "ffn.down": "output.dense"}
    yield from _separate(f"encoder.layer.{i}", names | last, True)


def _falcon(i: int) -> Iterator[Place]:
    stem = f"transformer.h.{i}"
    yield from _fused(f"{stem}.self_attention.query_key_value", MULTI_QUERY, transposed=False, bias=False)
    names = {"attention.o": "self_attention.dense", "ffn.up": "mlp.dense_h_to_4h", "ffn.down": "mlp.dense_4h_to_h"}
    yield from _separate(stem, names, False)


def _with_out_proj(stem: str, module: str, biases: str) -> Iterator[Place]:
    for part, name in zip("qkvo", ("q_proj", "k_proj", "v_proj", "out_proj"), strict=True):
        yield _plain(f"attention.{part}", f"{stem}.{module}.{name}", part in biases)


def _seq2seq(biases: str, i: int) -> Iterator[Place]:
    for stack in ("encoder", "decoder"):
        stem = f"{stack}.layers.{i}"
        for module in ("self_attn", "encoder_attn")[: 1 + (stack == "decoder")]:
            yield from _with_out_proj(stem, module, biases)
        yield from _separate(stem, {"ffn.up": "fc1", "ffn.down": "fc2"}, True)


def _clip(i: int) -> Iterator[Place]:
    yield from _with_out_proj(f"{CLIP}encoder.layers.{i}", "self_attn", "qkvo")
    yield from _separate(f"{CLIP}encoder.layers.{i}.mlp", {"ffn.up": "fc1", "ffn.down": "fc2"}, True)


BUILDERS = {
    "bert": _bert,
    "llama": _llama,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "t5": _t5,
    "vit": _vit,
    "mixtral": _mixtral,
    "nano": _nano,
    "minilm": _bert,
    "roberta": _bert,
    "deberta": _deberta,
    "falcon": _falcon,
    "gemma2": _llama,
    "bart": partial(_seq2seq, "qkvo"),
    "clip_text": _clip,
    "clip_vision": _clip,
    "whisper": partial(_seq2seq, "qvo"),
}
PLACES = {name: [place for i in range(zoo.LAYERS) for place in build(i)] for name, build in BUILDERS.items()}


def eager_model(name: str, dtype: torch.dtype) -> nn.Module:
    """The original model; Mixtral with an experts' implementation that has a float64 form."""
    model = zoo.build(name, "sdpa", dtype)
    if name == "mixtral":
        model.set_experts_implementation("batched_mm")
    return model


# the table of tokens, under the first of its names, and the rows of it that the laws train
TABLES = {
    **dict.fromkeys(("bert", "minilm", "roberta", "deberta"), "embeddings.word_embeddings.weight"),
    **dict.fromkeys(("llama", "mixtral", "gemma2"), "model.embed_tokens.weight"),
    "gpt2": "transformer.wte.weight",
    "falcon": "transformer.word_embeddings.weight",
    "gpt_neox": "gpt_neox.embed_in.weight",
    **dict.fromkeys(("t5", "bart"), "shared.weight"),
    "whisper": "decoder.embed_tokens.weight",
    "clip_text": "embeddings.token_embedding.weight",
    "nano": "tok.weight",
}
TOKENS = (60, 0, 5, 6, 7, *range(10, 40, 2))


def eager_outputs(
    name: str,
    model: nn.Module,
    adapters: Mapping[str, Tensor],
    inputs: Mapping[str, Any],
    alpha: float,
    scale_first: bool = False,
) -> list[Tensor]:
    """The outputs of the original model with the adapters' parameters, by their full names, put in.

    `scale_first`: (IA)3 was applied before LoRA, so its output vectors scale the base's product only.
    """
    weights = _adapted(name, dict(model.named_parameters()), adapters, alpha, scale_first)
    hooks = list(eager_adapters.hooks(name, model, adapters))
    try:
        return zoo.leaves(functional_call(model, weights, kwargs=dict(inputs)))
    finally:
        for hook in hooks:
            hook.remove()


def _adapted(
    name: str, stored: dict[str, Tensor], adapters: Mapping[str, Tensor], alpha: float, scale_first: bool
) -> dict[str, Tensor]:
    new = {key: value.detach() for key, value in stored.items()} | {k: v for k, v in adapters.items() if k in stored}
    for place in PLACES[name]:
        steps = [_add_product, _scale, _shift]
        if scale_first and place.role != "ffn.down":  # the hidden value is scaled before any product reads it
            steps.reverse()
        for step in steps:
            step(new, place, adapters, alpha)
    if "trainable_tokens.tokens" in adapters:
        rows = torch.tensor(TOKENS)
        new[TABLES[name]] = new[TABLES[name]].index_copy(0, rows, adapters["trainable_tokens.tokens"])
    return new


def _add_product(new: dict[str, Tensor], place: Place, adapters: Mapping[str, Tensor], alpha: float) -> None:
    if f"{place.owner}.lora_A" in adapters:
        a, b = adapters[f"{place.owner}.lora_A"], adapters[f"{place.owner}.lora_B"]
        new[place.weight] = _on_rows(new[place.weight], place, lambda w: w + alpha / a.shape[-2] * b @ a)
    if f"{place.owner}.dora_m" in adapters:
        m = adapters[f"{place.owner}.dora_m"]
        new[place.weight] = _on_rows(
            new[place.weight], place, lambda v: v * (m / v.norm(dim=-1).detach()).unsqueeze(-1)
        )
    if f"{place.owner}.lora_A0" in adapters:  # the start that PiSSA takes off
        a0, b0 = adapters[f"{place.owner}.lora_A0"], adapters[f"{place.owner}.lora_B0"]
        new[place.weight] = _on_rows(new[place.weight], place, lambda w: w - alpha / a0.shape[-2] * b0 @ a0)


def _scale(new: dict[str, Tensor], place: Place, adapters: Mapping[str, Tensor], alpha: float) -> None:
    name = f"{place.owner}.ia3_l"
    if name not in adapters and place.role == "ffn.down":
        name = f"{place.weight}_hidden.ia3_l"  # stacked experts
    if name not in adapters:
        return
    vector = adapters[name]
    if place.role == "ffn.down":
        new[place.weight] = _on_rows(new[place.weight], place, lambda w: w * vector.unsqueeze(-2))
        return
    new[place.weight] = _on_rows(new[place.weight], place, lambda w: w * vector.unsqueeze(-1))
    if place.bias is not None:
        bias, rows = new[place.bias], list(place.rows or range(vector.numel()))
        new[place.bias] = bias.index_copy(0, torch.tensor(rows), bias[rows] * vector)


def _shift(new: dict[str, Tensor], place: Place, adapters: Mapping[str, Tensor], alpha: float) -> None:
    name = f"{place.owner}.bitfit_d"
    if name in adapters:
        assert place.bias is not None
        bias, rows = new[place.bias], list(place.rows or range(len(adapters[name])))
        new[place.bias] = bias.index_add(0, torch.tensor(rows), adapters[name])


def _on_rows(weight: Tensor, place: Place, change: Any) -> Tensor:
    matrix = weight.mT if place.transposed else weight
    if place.rows is None:
        matrix = change(matrix)
    else:
        rows = torch.tensor(place.rows)
        matrix = matrix.index_copy(-2, rows, change(matrix.index_select(-2, rows)))
    return matrix.mT if place.transposed else matrix
