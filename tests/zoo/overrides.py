"""What the general rules of `shrink` and `models` cannot know of a model type."""

from __future__ import annotations

import re
from typing import Any

from . import special

# Pattern of model types -> values of fields; "text_config.x" is a field of the configuration inside.
SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
HALF_SECTIONS = SECTIONS | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}
SMALL_WINDOWS = {"image_size": 32, "patch_size": 4, "depths": [2], "num_heads": [3], "window_size": 4}
TABLE: tuple[tuple[str, dict[str, Any]], ...] = (
    (r"deepseek_v3[2]?|axk1|axk2|bailing_hybrid|glm4_moe_lite|glm_moe_dsa|kimi_linear|youtu", {}),
    (r"(swin|donut-swin|maskformer-swin|swinv2)", SMALL_WINDOWS),
    (r"codegen", {"n_head": 4, "n_embd": 64, "rotary_dim": 8, "n_inner": 80}),
    (r"gpt_neo", {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "intermediate_size": 80}),
    (r"esm", {"vocab_size": 61, "mask_token_id": 32, "pad_token_id": 1}),
    (r"squeezebert", {"embedding_size": 48}),
    (r"xmod", {"languages": ("en_XX",), "default_language": "en_XX"}),
    (r"mamba2", {"num_heads": 12, "head_dim": 8, "state_size": 16, "n_groups": 2}),
    (r"nemotron", {"head_dim": 8, "num_key_value_heads": 2}),
    (r"hunyuan_v1_dense|hunyuan_v1_moe|ministral", {"head_dim": 8, "num_key_value_heads": 2}),
    (r"lfm2_moe", {"layer_types": ["conv", "full_attention"] * 2, "num_hidden_layers": 4}),
    (r"qwen2_vl_text|qwen2_5_vl_text", {"hidden_size": 96, "rope_parameters": SECTIONS}),
    (
        r"glm4v_text|glm_ocr_text|glm_image_text|glm4v_moe_text",
        {"hidden_size": 96, "head_dim": 16, "rope_parameters": HALF_SECTIONS},
    ),
    (
        r"autoformer|informer|time_series_transformer",
        {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2, 3]},
    ),
    (r"whisper", {"max_source_positions": 32, "num_mel_bins": 10}),
    (
        r"(audio-spectrogram-transformer)",
        {"max_length": 32, "num_mel_bins": 24, "patch_size": 8, "frequency_stride": 8, "time_stride": 8},
    ),
    (
        r"segformer",
        {
            "depths": [2, 2, 2, 2],
            "hidden_sizes": [16, 32, 40, 48],
            "num_attention_heads": [1, 2, 5, 6],
            "image_size": 96,
        },
    ),
    (
        r"pvt|pvt_v2",
        {
            "depths": [2, 2, 2, 2],
            "hidden_sizes": [16, 32, 40, 48],
            "num_attention_heads": [1, 2, 5, 6],
            "image_size": 96,
        },
    ),
    (
        r"glpn",
        {
            "depths": [2, 2, 2, 2],
            "hidden_sizes": [16, 32, 40, 48],
            "num_attention_heads": [1, 2, 5, 6],
            "image_size": 96,
        },
    ),
    (
        r"levit",
        {
            "image_size": 64,
            "hidden_sizes": [16, 24, 40],
            "num_attention_heads": [2, 3, 5],
            "depths": [2, 2, 2],
            "key_dim": [8, 8, 8],
        },
    ),
    (r"convnext|convnextv2|dinov3_convnext", {"image_size": 64}),
    (r"efficientnet|align|bit|resnet|regnet", {"image_size": 96}),
    (r"deepseek_v2", {"num_experts_per_tok": 2}),
    (r"mobilevit|mobilevitv2", {"image_size": 128}),  # more than one patch in the last stage
    (r"siglip", {"vision_config.hidden_size": 48, "vision_config.num_attention_heads": 6}),
    (r"zamba", {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2}),
    (
        r"jamba",
        {
            "num_hidden_layers": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "use_mamba_kernels": False,
        },
    ),
    (
        r"reformer",
        {
            "axial_pos_embds_dim": [20, 28],
            "axial_pos_shape": [4, 7],
            "attn_layers": ["local", "local"],
            "local_attn_chunk_length": 7,
        },
    ),
    (r"(timesformer|vivit|videomae|vjepa2|xclip)", {"num_frames": 4}),
    (r"lxmert", {"l_layers": 2, "x_layers": 2, "r_layers": 2}),
    (r"videoprism.*", {"tubelet_size": [1, 8, 8], "num_spatial_layers": 2, "num_temporal_layers": 2}),
    (r"wav2vec2-bert", {"feature_projection_input_dim": 10}),
    (
        r"perceiver",
        {
            "num_latents": 11,
            "d_latents": 48,
            "d_model": 40,
            "num_self_attention_heads": 6,
            "num_cross_attention_heads": 5,
        },
    ),
    (r"layoutlmv3", {"coordinate_size": 8, "shape_size": 8}),
    (
        r"dbrx",
        {
            "d_model": 48,
            "n_heads": 6,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
            "ffn_config": {"ffn_hidden_size": 80, "moe_num_experts": 4},
        },
    ),
    (r"vits", {"vocab_size": 61}),
    (r"hiera", {"image_size": [64, 64], "depths": [1, 1], "embed_dim": 24, "num_heads": [2, 4]}),
)

# Classes that no mapping of the library names, or better ones than the first that it names.
CLASSES: dict[str, str] = {
    "musicgen": "MusicgenForConditionalGeneration",
    "musicgen_melody": "MusicgenMelodyForConditionalGeneration",
    "timesfm": "TimesFmModel",
    "timesfm2_5": "TimesFm2_5Model",
    "bark": "BarkSemanticModel",
}
# Types of which a part is built, since the whole has no forward of its own: the field that holds its configuration.
PARTS: dict[str, str] = {"bark": "semantic_config"}


def overrides(model_type: str, inner: bool = False) -> dict[str, Any]:
    """The values of fields that a type needs. `inner`: as a part of another one."""
    found: dict[str, Any] = {}
    for pattern, values in (*(() if inner else TABLE), *special.TABLE):
        if re.fullmatch(pattern, model_type):
            found |= values
    return found
