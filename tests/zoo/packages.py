"""Small models of packages that have nothing to do with transformers, where they are installed: the extra `zoo`.

They are written as their authors like it: by einsum and rearrangement, with axes in every order, with layers that are
shared, reversible, convolutional or of no known kind. A truth is read from the names that these authors give: `to_q`,
`to_kv`, `to_qkv`, `to_out`, and `FeedForward`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from .entry import Entry, Expected, Truth
from .notation import attention, feedforward

B, TOKENS = 2, 50


@dataclass(frozen=True)
class Package:
    """A model of a package.

    Attributes:
        module: the module that has its class.
        cls: the class, or what of it makes a model.
        options: what it is made with.
        example: the arguments of a call, by name.
        attends: whether its attentions are those of the names above; None: they cannot be told.
    """

    module: str
    cls: str
    options: Mapping[str, Any]
    example: Callable[[], Mapping[str, Any]]
    attends: bool | None = True

    def build(self) -> nn.Module:
        """The model, random, in evaluation."""
        torch.manual_seed(0)
        made = attrgetter(self.cls)(import_module(self.module))
        options = {name: value() if callable(value) else value for name, value in self.options.items()}
        model = made(**options).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:  # a norm that starts at zero hides what stands before it
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return model


def tokens(length: int, name: str = "x") -> Callable[[], dict[str, Tensor]]:
    """Numbers of tokens."""
    return lambda: {name: torch.randint(0, TOKENS, (B, length))}


def signal(*shape: int, name: str = "x") -> Callable[[], dict[str, Tensor]]:
    """A batch of values."""
    return lambda: {name: torch.randn(B, *shape)}


def layers(kind: str, **options: Any) -> Callable[[], nn.Module]:
    """The layers of x-transformers."""
    return lambda: getattr(import_module("x_transformers"), kind)(dim=24, depth=2, heads=3, attn_dim_head=8, **options)


TEXT = {"num_tokens": TOKENS, "dim": 24, "depth": 2}
HEADS = {"dim": 24, "depth": 2, "heads": 3, "dim_head": 8}
WRAPPED = {"num_tokens": TOKENS, "max_seq_len": 32}
WINDOWS = {**TEXT, "heads": 3, "max_seq_len": 16}
CELLS = {"categories": (4, 5, 6), "num_continuous": 3, "dim": 24, "dim_out": 1, "depth": 2, "heads": 3, "dim_head": 8}


def x_transformer(kind: str = "Decoder", **options: Any) -> Package:
    """A model of x-transformers with some of its many options."""
    made = {**WRAPPED, "attn_layers": layers(kind, **options)}
    return Package("x_transformers", "TransformerWrapper", made, tokens(9))


MODELS: dict[str, Package] = {
    "x-transformers/one-kv-head": x_transformer(attn_one_kv_head=True, rotary_pos_emb=True, ff_glu=True),
    "x-transformers/talking-heads": x_transformer(attn_pre_talking_heads=True, attn_post_talking_heads=True),
    "x-transformers/memory": x_transformer("Encoder", attn_num_mem_kv=3, use_rmsnorm=True, sandwich_norm=True),
    "x-transformers/streams": x_transformer(num_residual_streams=2, attn_gate_values=True),
    "linear-attention-transformer": Package(
        "linear_attention_transformer", "LinearAttentionTransformerLM",
        {**WINDOWS, "n_local_attn_heads": 1, "local_attn_window_size": 4}, tokens(16), None,
    ),
    "performer-pytorch": Package(
        "performer_pytorch", "PerformerLM",
        {**WINDOWS, "dim_head": 8, "generalized_attention": True, "nb_features": 8, "feature_redraw_interval": None},
        tokens(16), None,
    ),
    "tab-transformer-pytorch": Package(
        "tab_transformer_pytorch", "FTTransformer", CELLS,
        lambda: {"x_categ": torch.randint(0, 4, (5, 3)), "x_numer": torch.randn(5, 3)},
    ),
    "rtdl-revisiting-models": Package(
        "rtdl_revisiting_models", "ResNet",
        {"d_in": 6, "d_out": 2, "n_blocks": 2, "d_block": 12, "d_hidden": None, "d_hidden_multiplier": 2.0,
         "dropout1": 0.1, "dropout2": 0.0},
        signal(6), None,
    ),
    "conformer": Package(
        "conformer", "Conformer", {**HEADS, "ff_mult": 2, "conv_expansion_factor": 2, "conv_kernel_size": 7},
        signal(11, 24),
    ),
    "perceiver-pytorch": Package(
        "perceiver_pytorch", "PerceiverIO",
        {"depth": 2, "dim": 16, "queries_dim": 12, "logits_dim": 7, "num_latents": 5, "latent_dim": 24,
         "cross_heads": 1, "latent_heads": 3, "cross_dim_head": 8, "latent_dim_head": 8},
        lambda: {"data": torch.randn(B, 11, 16), "queries": torch.randn(6, 12)},
    ),
    "nystrom-attention": Package(
        "nystrom_attention", "Nystromformer", {**HEADS, "num_landmarks": 4, "pinv_iterations": 3}, signal(16, 24), None
    ),
    "axial-attention": Package(
        "axial_attention", "AxialAttention", {"dim": 24, "dim_index": 1, "heads": 3, "num_dimensions": 2},
        signal(24, 6, 5),
    ),
    "g-mlp-pytorch": Package("g_mlp_pytorch", "gMLP", {**TEXT, "seq_len": 16}, tokens(16), None),
    "mlp-mixer-pytorch": Package(
        "mlp_mixer_pytorch.mlp_mixer_pytorch", "MLPMixer",
        {"image_size": 32, "channels": 3, "patch_size": 8, "dim": 24, "depth": 2, "num_classes": 7},
        signal(3, 32, 32, name="input"), None,
    ),
    "efficientnet-pytorch": Package(
        "efficientnet_pytorch", "EfficientNet.from_name",
        {"model_name": "efficientnet-b0", "width_coefficient": 0.25, "depth_coefficient": 0.25, "num_classes": 7},
        signal(3, 32, 32, name="inputs"), None,
    ),
    "linformer": Package(
        "linformer", "LinformerLM", {**TEXT, "seq_len": 16, "heads": 3, "dim_head": 8, "k": 4}, tokens(16), None
    ),
    "bottleneck-transformer-pytorch": Package(
        "bottleneck_transformer_pytorch", "BottleStack",
        {"dim": 12, "fmap_size": 8, "dim_out": 24, "proj_factor": 2, "downsample": True, "heads": 2, "dim_head": 6,
         "num_layers": 2, "rel_pos_emb": True},
        signal(12, 8, 8), None,
    ),
    "lambda-networks": Package(
        "lambda_networks", "LambdaLayer", {"dim": 12, "dim_out": 12, "r": 3, "dim_k": 4, "heads": 3, "dim_u": 2},
        signal(12, 8, 8), None,
    ),
    "point-transformer-pytorch": Package(
        "point_transformer_pytorch", "PointTransformerLayer",
        {"dim": 12, "pos_mlp_hidden_dim": 8, "attn_mlp_hidden_mult": 2},
        lambda: {"x": torch.randn(B, 7, 12), "pos": torch.randn(B, 7, 3)}, None,
    ),
    "mambapy": Package(
        "mambapy.mamba", "Mamba",
        {"config": lambda: import_module("mambapy.mamba").MambaConfig(d_model=16, n_layers=2)}, signal(9, 16), None,
    ),
    "minGRU-pytorch": Package("minGRU_pytorch.minLM", "minLM", TEXT, tokens(9), None),
    "local-attention": Package(
        "local_attention", "LocalTransformer",
        {**WINDOWS, "dim_head": 8, "causal": True, "local_attn_window_size": 4}, tokens(16),
    ),
    "sinkhorn-transformer": Package(
        "sinkhorn_transformer", "SinkhornTransformerLM",
        {**WINDOWS, "dim_head": 8, "bucket_size": 4, "causal": False}, tokens(16), None,
    ),
    "memory-transformer-xl": Package(
        "memory_transformer_xl", "MemoryTransformerXL", {**TEXT, "heads": 3, "seq_len": 8, "mem_len": 8}, tokens(8),
        None,
    ),
}  # fmt: skip


def _truth(package: Package, model: nn.Module) -> Truth:
    if package.attends is None:
        return Truth(None, None)
    return Truth(tuple(_attentions(model)), tuple(_feedforwards(model)))


def _attentions(model: nn.Module) -> Iterator[Expected]:
    for path, module in model.named_modules():
        parts = dict(module.named_children())
        if "to_qkv" in parts:
            width = _features(parts["to_qkv"]) // 3
            roles = {role: f"to_qkv.weight[{i * width}:{(i + 1) * width}]" for i, role in enumerate("qkv")}
        elif "to_kv" in parts:
            width = _features(parts["to_kv"]) // 2
            roles = {"q": "to_q.weight", "k": f"to_kv.weight[0:{width}]", "v": f"to_kv.weight[{width}:{2 * width}]"}
        elif "to_k" in parts:
            roles = {role: f"to_{role}.weight" for role in "qkv"}
        else:
            continue
        out = "to_out.0.weight" if isinstance(parts["to_out"], nn.Sequential) else "to_out.weight"
        yield attention(path, kind=None, **roles, o=out)


def _feedforwards(model: nn.Module) -> Iterator[Expected]:
    for path, module in model.named_modules():
        if type(module).__name__ == "FeedForward":
            first, *_, last = [name for name, one in module.named_modules() if isinstance(one, nn.Linear)]
            wide, inner = _features(module.get_submodule(first)), module.get_submodule(last).in_features
            roles = {"up": f"{first}.weight", "down": f"{last}.weight"}
            if wide == 2 * inner:  # what is multiplied comes first
                roles |= {"up": f"{first}.weight[0:{inner}]", "gate": f"{first}.weight[{inner}:{wide}]"}
            yield feedforward(path, **roles)


def _features(layer: nn.Module) -> int:
    assert isinstance(layer, nn.Linear)
    return layer.out_features


def _entry(name: str, package: Package) -> Entry:
    return Entry(
        f"package/{name}",
        "package",
        package.build,
        lambda _: package.example(),
        lambda model, _: _truth(package, model),
    )


ENTRIES = [
    _entry(name, package)
    for name, package in MODELS.items()
    if importlib.util.find_spec(package.module.partition(".")[0]) is not None
]
