"""Models of timm, where it is installed: image transformers of many kinds, hybrids, and networks without attention."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from functools import cache, partial
from types import ModuleType
from typing import Any

import torch
from torch import nn

from .entry import Entry, Expected, Truth
from .notation import attention, entry, feedforward, thirds

# Classes whose one projection is laid out [heads, (q, k, v), features], and what their heads' parts are called.
BY_HEAD = {
    "levit.Attention": ("key_dim", "key_dim", "val_dim"),
}
# What has a qkv, and mixes without a softmax of a product: XCiT and DaViT over channels are attention, these are not.
LINEAR = ("FactorAttnConvRelPosEnc", "LinearSelfAttention", "LiteMLA")
PLAIN = {"embed_dim": 24, "depth": 2, "num_heads": 3, "img_size": 24, "patch_size": 8}
NO_DROPS = {"drop_path_rate": 0.0}
PAIRED = {
    **NO_DROPS,
    "img_size": 32,
    "patch_size": 2,
    "window_size": 4,
    "embed_dim": 12,
    "depths": (2, 2),
    "num_heads": (3, 6),
}
MLPS = {"img_size": 64}

# name -> timm's name, options, side of the image
MODELS: dict[str, tuple[str, dict[str, Any], int]] = {
    "vit": ("vit_tiny_patch16_224", PLAIN, 24),
    "vit-qk-norm": (
        "vit_tiny_patch16_224",
        {**PLAIN, "qk_norm": True, "init_values": 1e-5, "class_token": False, "global_pool": "avg"},
        24,
    ),
    "vit-latent-pool": ("vit_tiny_patch16_224", {**PLAIN, "class_token": False, "global_pool": "map"}, 24),
    "vit-parallel": ("vit_small_patch16_36x1_224", PLAIN, 24),
    "deit-distilled": ("deit_tiny_distilled_patch16_224", PLAIN, 24),
    "beit": ("beit_base_patch16_224", PLAIN, 24),
    "eva02": ("eva02_tiny_patch14_224", PLAIN, 24),
    "swin": ("swin_tiny_patch4_window7_224", PAIRED, 32),
    "swinv2": ("swinv2_tiny_window8_256", PAIRED, 32),
    "cait": ("cait_xxs24_224", PLAIN, 24),
    "xcit": ("xcit_nano_12_p16_224", {**PLAIN, "img_size": 32}, 32),
    "crossvit": (
        "crossvit_9_240",
        {
            "img_size": 48,
            "patch_size": (12, 16),
            "embed_dim": (12, 24),
            "depth": ((1, 2, 0), (1, 2, 0)),
            "num_heads": (3, 3),
            "mlp_ratio": (2.0, 2.0, 1.0),
            "img_scale": (1.0, 1.0),
        },
        48,
    ),
    "pvt-v2": (
        "pvt_v2_b0",
        {"depths": (2, 2), "embed_dims": (8, 16), "num_heads": (1, 2), "sr_ratios": (2, 1), "mlp_ratios": (2, 3)},
        32,
    ),
    "twins": (
        "twins_svt_small",
        {
            "img_size": 32,
            "patch_size": 2,
            "embed_dims": (8, 16),
            "num_heads": (1, 2),
            "depths": (2, 2),
            "wss": (4, 4),
            "sr_ratios": (2, 1),
            "mlp_ratios": (2, 2),
        },
        32,
    ),
    "levit": (
        "levit_128s",
        {"img_size": 128, "embed_dim": (16, 24, 32), "key_dim": 8, "depth": (1, 1, 1), "num_heads": (2, 3, 4)},
        128,
    ),
    "convit": ("convit_tiny", {**PLAIN, "depth": 3, "local_up_to_layer": 2}, 24),
    "tnt": (
        "tnt_s_legacy_patch16_224",
        {**PLAIN, "img_size": 32, "inner_dim": 12, "num_heads": None, "num_heads_inner": 2, "num_heads_outer": 3},
        32,
    ),
    "mixer": ("mixer_s32_224", MLPS, 64),
    "resmlp": ("resmlp_12_224", MLPS, 64),
    "gmlp": ("gmlp_ti16_224", MLPS, 64),
    "poolformer": ("poolformer_s12", {}, 64),
    "resnet-se": ("seresnet50", {"layers": (1, 1, 1, 1)}, 64),
    "mobilenetv3": ("mobilenetv3_small_050", {}, 64),
}


def attentions(model: nn.Module) -> Iterator[Expected]:
    for path, module in model.named_modules():
        roles = _roles(module)
        if roles and type(module).__name__ not in LINEAR:
            yield attention(path, kind=None, **roles)


def _roles(module: nn.Module) -> dict[str, str]:
    """The projections of a module with attention in it, by the attributes its class gives them."""
    known = {name for name, _ in module.named_children()}
    out = {"o": _weight(module, "proj")} if "proj" in known else {}
    if "qkv" in known and isinstance(module.get_submodule("qkv"), nn.Module):
        weight = _weight(module, "qkv")
        return _packed(module, weight) | out if weight else {}
    if {"q", "kv"} <= known:
        return {"q": _weight(module, "q")} | _pair(module, _weight(module, "kv")) | out
    if {"qk", "v"} <= known:
        half = module.get_parameter("qk.weight").shape[0] // 2
        return {"q": f"qk.weight[0:{half}]", "k": f"qk.weight[{half}:{2 * half}]", "v": "v.weight"} | out
    for names in (("q", "k", "v"), ("wq", "wk", "wv"), ("q_proj", "k_proj", "v_proj")):
        if set(names) <= known:
            return {role: f"{name}.weight" for role, name in zip("qkv", names, strict=True)} | out
    return {}


def _pair(module: nn.Module, weight: str) -> dict[str, str]:
    """k and v: halves, or LeViT's [heads, (k, v), features]."""
    width = module.get_parameter(weight).shape[0]
    if not hasattr(module, "val_dim"):
        return {"k": f"{weight}[0:{width // 2}]", "v": f"{weight}[{width // 2}:{width}]"}
    return _by_head(weight, width, {"k": int(module.key_dim), "v": int(module.val_dim)})  # pyright: ignore


def _weight(module: nn.Module, name: str) -> str:
    """The weight of a linear or a convolution, which may be wrapped with a norm (and, behind attention, a bend)."""
    found = [
        f"{name}.{inner}.weight" if inner else f"{name}.weight"
        for inner, one in module.get_submodule(name).named_modules()
        if isinstance(one, nn.Linear | nn.Conv2d)
    ]
    return found[0] if found else ""


def _packed(module: nn.Module, weight: str) -> dict[str, str]:
    width = module.get_parameter(weight).shape[0]
    key = f"{type(module).__module__.rpartition('.')[2]}.{type(module).__name__}"
    sizes = BY_HEAD.get(key)
    if sizes is None:
        return thirds(weight, width // 3)
    return _by_head(weight, width, {role: int(getattr(module, name)) for role, name in zip("qkv", sizes, strict=True)})


def _by_head(weight: str, width: int, sizes: dict[str, int]) -> dict[str, str]:
    whole, found, start = sum(sizes.values()), {}, 0
    for role, size in sizes.items():
        runs = (f"{at + start}:{at + start + size}" for at in range(0, width, whole))
        found[role] = f"{weight}[{','.join(runs)}]"
        start += size
    return found


def feedforwards(model: nn.Module) -> Iterator[Expected]:
    """Every Mlp but those over positions, and gated ones. Inverted bottlenecks are told in no way."""
    for path, module in model.named_modules():
        known = {name for name, _ in module.named_children()}
        over_positions = path.rpartition(".")[2] in ("mlp_tokens", "linear_tokens") or "gate" in known
        if {"fc1_g", "fc1_x", "fc2"} <= known:
            yield feedforward(path, gate="fc1_g.weight", up="fc1_x.weight", down="fc2.weight")
        elif type(module).__name__ == "GluMlp":
            yield feedforward(path, down="fc2.weight", **_gated(module))
        elif {"fc1", "fc2"} <= known and not over_positions and "Se" not in type(module).__name__:
            yield feedforward(path, up="fc1.weight", down="fc2.weight")


def _gated(module: nn.Module) -> dict[str, str]:
    half = module.get_parameter("fc1.weight").shape[0] // 2
    names = ("up", "gate") if module.gate_last else ("gate", "up")
    return {name: f"fc1.weight[{i * half}:{(i + 1) * half}]" for i, name in enumerate(names)}


def truth_of(model: nn.Module) -> Truth:
    return Truth(tuple(attentions(model)), tuple(feedforwards(model)))


@cache
def library() -> ModuleType:
    """timm; where torchvision is built for CUDA and torch is not, with the operators declared that it asks for."""
    try:
        return importlib.import_module("timm")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    declared = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        declared.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    DECLARED.append(declared)
    return importlib.import_module("timm")


DECLARED: list[torch.library.Library] = []  # they last as long as their object


def build(name: str, options: dict[str, Any]) -> nn.Module:
    given = {key: value for key, value in options.items() if value is not None}
    model = library().create_model(name, pretrained=False, num_classes=5, **given)
    for module in model.modules():
        if hasattr(module, "rel_indices"):
            module.rel_indices = module.get_rel_indices(9)  # made by the first call, and kept
    return model


ENTRIES: list[Entry] = [
    entry(
        f"timm/{name}",
        "library",
        partial(build, timm_name, options),
        lambda side=side: {"x": torch.randn(3, 3, side, side)},
        truth_of,
    )
    for name, (timm_name, options, side) in MODELS.items()
    if importlib.util.find_spec("timm") is not None
]
