"""A tiny configuration of any model type: a walk over the fields of its class, and of the configurations inside it.

Sizes are small and differ from one another, so that no axis can be taken for another one.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .overrides import overrides


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of one stack. The towers of one model differ in them."""

    width: int
    heads: int
    ffn: int
    head: int = 8
    kv: int = 2
    layers: int = 2
    vocab: int = 61


TEXT, VISION, AUDIO = Sizes(48, 6, 80), Sizes(40, 5, 56, kv=1), Sizes(32, 4, 44)

# The first pattern that matches a field's whole name gives its value; fields whose default is None are left alone
# unless the pattern is marked so, because many mean "derive it from the others".
RULES: tuple[tuple[str, object], ...] = (
    (r".*(drop_?path|layer_?drop|layerdrop|drop_connect|stochastic_depth|droppath).*", 0.0),
    (r"(d|n|num)_.*(dropout|drop).*", 0.0),
    (r"mask_(time|feature)_prob", 0.0),
    (
        r"apply_spec_augment|use_mems_(eval|train)|use_cache|return_dict_in_generate|output_(attentions|hidden_states|loading_info)",
        False,
    ),
    (r"(qk_)?rope_head_dim|qk_rope_head_dim|rotary_dim|rope_dim", 4),
    (r"qk_nope_head_dim|nope_head_dim", 8),
    (r"v_head_dim", 10),
    (r"q_lora_rank", 18),
    (r"kv_lora_rank|o_lora_rank", 14),
    (r"(n|num)_?head_?kv|num_kv_heads|num_key_value_heads|n_kv_heads|n_head_kv", "kv"),
    (r"(global_|swa_|linear_)?head_dim|dim_head|d_head|attention_head_dim|kv_channels|d_kv|key_dim", "head"),
    (r"linear_num_key_heads", 2),
    (r"linear_num_value_heads", 4),
    (r"linear_(key|value)_head_dim", 12),
    (r"index_n_heads|mamba_n_heads|mamba_num_heads|linear_num_heads", 4),
    (r"index_head_dim", 8),
    (r"(.*_)?(num|n)_(attention_|self_attention_|cross_attention_)?heads?|num_attn_heads", "heads"),
    (r"(.*_)?attention_heads", "heads"),
    (r"(.*_)?vocab(_size)?(_size_per_layer_input)?|vocab_size.*", "vocab"),
    (r"type_vocab_size", 2),
    (r"moe_intermediate_size|expert_intermediate_size|expert_ffn_hidden_size|moe_ffn_hidden_size", 20),
    (r"shared_expert_intermediate_size|moe_shared_expert_intermediate_size|shared_intermediate_size", 28),
    (r"(.*_)?(intermediate_size|intermediate_dim|ffn_dim|d_ff|ffn_hidden_size|n_inner|mlp_dim|mlp_hidden_size)", "ffn"),
    (r"d_inner|inner_dim|feedforward_dim|encoder_feedforward_dim|dim_feedforward", "ffn"),
    (r"out_hidden_size|text_hidden_size", TEXT.width),  # of the text's model, in a configuration of pictures
    (r"(.*_)?(hidden_size|d_model|n_embd|embed_dim|hidden_dim|n_embed|dim_model|emb_dim|model_dim)", "width"),
    (r"dim|width|attn_hidden_size|language_dim", "width"),
    (r"embedding_size|word_embed_proj_dim|embedding_dim", 24),
    (r"projection_dim|pooler_output_size|shared_embed_dim", 40),
    (r"(.*_)?(num|n)_(hidden_|transformer_|encoder_|decoder_|text_|vision_)?layers?", "layers"),
    (r"(.*_)?(encoder|decoder)_layers|layers|depth|(.*_)?num_blocks|resampler_depth|.*_depth", "layers"),
    (r"num_hidden_groups", 1),
    (r"depths", 2),
    (r"upsample_groups|decoder_in_channels", "width"),
    (r"(num_)?(convolution_)?groups|norm_num_groups|num_groups", 2),
    (r"(max_|n_|num_)?(position_embeddings|positions|position)|max_.*positions?|max_position_embeddings", 64),
    (r"max_seq_len|max_sequence_length|max_seq_length|block_size_max", 64),
    (r"sliding_window|attention_window|local_attention|attention_chunk_size|window", 4),
    (r"(image|input|img|pretrain_image|crop)_size", 24),
    (r"patch_size", 8),
    (r"(num|n)_?(local_|routed_|total_)?experts|n_routed_experts|moe_num_experts|num_experts", 4),
    (r"num_experts_per_tok(en)?|moe_topk|moe_top_?k|top_?k_experts|num_experts_per_token|moe_k|router_top_k", 2),
    (r"(n|num)_group|topk_group", 1),
    (r"n_shared_experts|num_shared_experts|moe_num_shared_experts", 1),
    (r"first_k_dense_replace|num_dense_layers", 1),
    (r"num_mel_bins|num_mels|n_mels|feature_size|input_feat_per_channel", 10),
    (r"num_labels", 5),
)

IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 2, "cls_token_id": 1}
IDS |= {"decoder_start_token_id": 0, "forced_eos_token_id": 2, "forced_bos_token_id": 1}
SPECIAL = r".*_(token_id|token_index|token_idx)"  # placeholders of images and sounds, from the end of the vocabulary
SAME_STRUCTURE = {"full_attention", "sliding_attention", "chunked_attention"}
KEEP = object()


def small_config(model_type: str) -> PreTrainedConfig:
    """A tiny configuration of a model type."""
    return _small(CONFIG_MAPPING[model_type], TEXT, {}, overrides(model_type))


def _small(
    kind: type[PreTrainedConfig], sizes: Sizes, defaults: Mapping[str, Any], special: Mapping[str, Any]
) -> PreTrainedConfig:
    """A tiny `kind`; `special` are values of fields, or of fields of a configuration inside: "text_config.depth"."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        found = _value(field.name, defaults.get(field.name, _default(field)), sizes)
        if field.init and found is not KEEP:
            values[field.name] = found
    values |= _layer_types(kind)
    if any(field.name == "kv_lora_rank" for field in dataclasses.fields(kind)) and "num_key_value_heads" in values:
        values["num_key_value_heads"] = sizes.heads  # latent attention expands to all heads
    values |= {key: value for key, value in defaults.items() if key not in values}
    if "num_hidden_layers" in values and values.get("out_indices"):
        values |= {"num_hidden_layers": len(values["out_indices"])}
        values |= {"out_indices": list(range(1, 1 + values["num_hidden_layers"]))}
    values |= _placeholders({field.name for field in dataclasses.fields(kind)}, sizes)
    values |= _nested(kind, special)
    values |= {key: value for key, value in special.items() if "." not in key}
    return kind(**values)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else None


def _value(name: str, default: Any, sizes: Sizes) -> Any:
    """The small value of a field, or KEEP."""
    if name in IDS:
        return IDS[name] if default is not None or name == "pad_token_id" else KEEP
    for pattern, value in RULES:
        if re.fullmatch(pattern, name):
            return _fitted(getattr(sizes, value) if isinstance(value, str) else value, default)
    return KEEP


def _fitted(value: Any, default: Any) -> Any:
    """A rule's value in the form of the default: a number, or a list of as many numbers."""
    if isinstance(default, list | tuple):
        numbers = bool(default) and all(isinstance(item, int | float) for item in default)
        return type(default)(value for _ in default) if numbers else KEEP
    if default is None or isinstance(default, str | dict) or isinstance(default, bool) is not isinstance(value, bool):
        return KEEP
    if isinstance(default, bool):
        return value
    return type(default)(min(value, default)) if isinstance(default, int) and default > 0 else type(default)(value)


def _layer_types(kind: type[PreTrainedConfig]) -> dict[str, Any]:
    """Every kind of layer twice, where layers differ in structure."""
    if not any(field.name == "layer_types" for field in dataclasses.fields(kind)):
        return {}
    kinds = list(dict.fromkeys(kind().layer_types or ()))  # pyright: ignore[reportAttributeAccessIssue]
    if len(kinds) < 2 or set(kinds) <= SAME_STRUCTURE:
        return {}
    return {"layer_types": kinds * 2, "num_hidden_layers": 2 * len(kinds)}


def _placeholders(names: set[str], sizes: Sizes) -> dict[str, int]:
    special = sorted(name for name in names if re.fullmatch(SPECIAL, name) and name not in IDS)
    return {name: sizes.vocab - 1 - i for i, name in enumerate(special)}


def _nested(kind: type[PreTrainedConfig], special: Mapping[str, Any]) -> dict[str, Any]:
    """The tiny configurations inside a configuration."""
    found: dict[str, Any] = {}
    for name, spec in (getattr(kind, "sub_configs_defaults", None) or kind.sub_configs or {}).items():
        if name in special:
            continue
        inner = getattr(spec, "config_class", spec)
        if not dataclasses.is_dataclass(inner):
            inner = CONFIG_MAPPING[spec.model_type]
        prefix = name + "."
        own = {key.removeprefix(prefix): value for key, value in special.items() if key.startswith(prefix)}
        tower = VISION if re.search("vision|image|video|vq|vit", name) else TEXT
        tower = AUDIO if re.search("audio|speech|codec|sound", name) else tower
        own = overrides(inner.model_type, inner=True) | own
        found[name] = _small(inner, tower, getattr(spec, "init_kwargs", None) or {}, own)
    return found
