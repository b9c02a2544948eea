"""Tiny models of diffusers, where it is installed: attention inside convolutional U-Nets, autoencoders, transformers
with adaptive norms, and streams that attend jointly."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from .entry import Entry, Expected, Truth
from .notation import Example, attention, entry, feedforward

B, TEXT = 3, 5
# The attributes that hold the projections of each role; a stream of its own has the second set.
ROLES = {
    "q": ("to_q", "add_q_proj"),
    "k": ("to_k", "add_k_proj"),
    "v": ("to_v", "add_v_proj"),
    "o": ("to_out.0", "to_out", "to_add_out"),
}
# "transformer_blocks.3" is a layer; inside a U-Net's stages blocks have no number of their own.
NUMBERED = re.compile(r"^(?:transformer_blocks|joint_transformer_blocks|blocks)\.(\d+)\.")


def attentions(model: nn.Module, across: str | None) -> Iterator[Expected]:
    """Every module with a to_q; `across`: the name of those that read a memory."""
    for path, module in model.named_modules():
        if not hasattr(module, "to_q"):
            continue
        roles = {role: " + ".join(_weights(module, names)) for role, names in ROLES.items()}
        roles |= _outside(model, path) if not roles["o"] else {}
        kind = "cross" if across is not None and path.rpartition(".")[2] == across else "self"
        yield attention(path, layer=_layer(path), kind=kind, **{role: text for role, text in roles.items() if text})


def _weights(module: nn.Module, names: tuple[str, ...]) -> Iterator[str]:
    for name in names:
        try:
            found = module.get_submodule(name)
        except AttributeError:
            continue
        if isinstance(found, nn.Linear | nn.Conv2d):
            yield f"{name}.weight"


def _outside(model: nn.Module, path: str) -> dict[str, str]:
    """Flux's single blocks: the projection that reads the attention stands beside it, and reads the MLP as well."""
    block = path.rpartition(".")[0]
    return {"o": f"/{block}.proj_out.weight"} if block and hasattr(model.get_submodule(block), "proj_mlp") else {}


def _layer(path: str) -> int | None:
    numbered = NUMBERED.match(path)
    return None if numbered is None else int(numbered[1])


def feedforwards(model: nn.Module) -> Iterator[Expected]:
    """FeedForward(net=[activation with a projection, dropout, projection]); a GEGLU holds the value first."""
    for path, module in model.named_modules():
        if type(module).__name__ != "FeedForward":  # AuraFlow's own sits outside of the stream its attention is on
            continue
        entering = module.get_submodule("net.0.proj")
        assert isinstance(entering, nn.Linear)
        roles = {"up": "net.0.proj.weight", "down": "net.2.weight"}
        if "GLU" in type(module.get_submodule("net.0")).__name__:
            half = entering.out_features // 2
            roles |= {"up": f"net.0.proj.weight[0:{half}]", "gate": f"net.0.proj.weight[{half}:{2 * half}]"}
        yield feedforward(path, layer=_layer(path), **roles)


def truth_of(across: str | None, model: nn.Module) -> Truth:
    return Truth(tuple(attentions(model, across)), tuple(feedforwards(model)))


def image(channels: int = 4, height: int = 8, width: int = 12) -> torch.Tensor:
    return torch.randn(B, channels, height, width)


def steps() -> torch.Tensor:
    return torch.tensor([1, 5, 9])


def flux() -> Example:
    return {
        "hidden_states": torch.randn(B, 12, 4),
        "encoder_hidden_states": torch.randn(B, TEXT, 14),
        "pooled_projections": torch.randn(B, 10),
        "timestep": torch.rand(B),
        "img_ids": torch.randn(12, 3),
        "txt_ids": torch.randn(TEXT, 3),
        "return_dict": False,
    }


def told(**more: torch.Tensor) -> Example:
    return {"timestep": steps(), "return_dict": False, **more}


TINY = {"sample_size": 8, "norm_num_groups": 2, "layers_per_block": 1}
HEADS = {"num_attention_heads": 3, "attention_head_dim": 8, "num_layers": 2}
JOINT = {**HEADS, "joint_attention_dim": 14}

# name -> class, options, example, the name of the attention to a memory
MODELS: dict[str, tuple[str, dict[str, Any], Callable[[], Example], str | None]] = {
    "unet2d-condition": (
        "UNet2DConditionModel",
        {
            **TINY,
            "block_out_channels": (16, 24),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": 10,
            "attention_head_dim": 4,
        },
        lambda: told(sample=image(), encoder_hidden_states=torch.randn(B, TEXT, 10)),
        "attn2",
    ),
    "unet2d": (
        "UNet2DModel",
        {
            **TINY,
            "block_out_channels": (16, 24),
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "in_channels": 4,
            "out_channels": 4,
            "attention_head_dim": 4,
        },
        lambda: told(sample=image()),
        None,
    ),
    "autoencoder-kl": (
        "AutoencoderKL",
        {
            **TINY,
            "block_out_channels": (8, 16),
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
        },
        lambda: {"sample": image(3), "return_dict": False},
        None,
    ),
    "dit": (
        "DiTTransformer2DModel",
        {**HEADS, "sample_size": 8, "norm_num_groups": 2, "num_embeds_ada_norm": 10},
        lambda: told(hidden_states=image(4, 8, 8), class_labels=torch.tensor([1, 2, 3])),
        None,
    ),
    "pixart": (
        "PixArtTransformer2DModel",
        {
            **HEADS,
            "cross_attention_dim": 24,
            "caption_channels": 14,
            "sample_size": 8,
            "use_additional_conditions": False,
        },
        lambda: told(hidden_states=image(4, 8, 8), encoder_hidden_states=torch.randn(B, TEXT, 14)),
        "attn2",
    ),
    "sd3": (
        "SD3Transformer2DModel",
        {**JOINT, "sample_size": 8, "in_channels": 4, "caption_projection_dim": 24, "pooled_projection_dim": 10},
        lambda: told(
            hidden_states=image(4, 8, 8),
            encoder_hidden_states=torch.randn(B, TEXT, 14),
            pooled_projections=torch.randn(B, 10),
        ),
        None,
    ),
    "flux": (
        "FluxTransformer2DModel",
        {**JOINT, "num_single_layers": 2, "in_channels": 4, "pooled_projection_dim": 10, "axes_dims_rope": (4, 2, 2)},
        flux,
        None,
    ),
    "aura-flow": (
        "AuraFlowTransformer2DModel",
        {
            "sample_size": 8,
            "num_mmdit_layers": 2,
            "num_single_dit_layers": 2,
            "num_attention_heads": 3,
            "attention_head_dim": 8,
            "joint_attention_dim": 14,
            "caption_projection_dim": 24,
            "pos_embed_max_size": 64,
        },
        lambda: told(hidden_states=image(4, 8, 8), encoder_hidden_states=torch.randn(B, TEXT, 14)),
        None,
    ),
    "wan": (
        "WanTransformer3DModel",
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 14,
            "freq_dim": 8,
            "ffn_dim": 40,
            "attention_head_dim": 12,
        },
        lambda: told(hidden_states=torch.randn(B, 4, 2, 8, 12), encoder_hidden_states=torch.randn(B, TEXT, 14)),
        "attn2",
    ),
    "prior": (
        "PriorTransformer",
        {**HEADS, "embedding_dim": 10, "num_embeddings": TEXT, "additional_embeddings": 4},
        lambda: told(
            hidden_states=torch.randn(B, 10),
            proj_embedding=torch.randn(B, 10),
            encoder_hidden_states=torch.randn(B, TEXT, 10),
        ),
        None,
    ),
}


def build(class_name: str, options: dict[str, Any]) -> nn.Module:
    import diffusers

    model = getattr(diffusers, class_name)(**options)
    for module in model.modules():
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0  # labels dropped in training only; no option of the model's own
    return model


ENTRIES: list[Entry] = [
    entry(f"diffusers/{name}", "library", partial(build, class_name, options), example, partial(truth_of, across))
    for name, (class_name, options, example, across) in MODELS.items()
    if importlib.util.find_spec("diffusers") is not None
]
