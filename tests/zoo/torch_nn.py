"""torch.nn's own transformer modules, in every layout they have."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from .entry import Entry, Expected, Truth
from .notation import Example, attention, entry, feedforward, thirds

D, H, FFN, B, S, M = 24, 3, 40, 3, 7, 5
PACKED = {**thirds("in_proj_weight", D), "o": "out_proj.weight"}
APART = {**{role: f"{role}_proj_weight" for role in "qkv"}, "o": "out_proj.weight"}
FED = {"up": "linear1.weight", "down": "linear2.weight"}


def values(length: int, batch_first: bool, width: int = D) -> Tensor:
    return torch.randn(*((B, length) if batch_first else (length, B)), width)


def encoder_truth(stem: str, layout: str, layers: int = 2) -> list[Expected]:
    found: list[Expected] = []
    for i in range(layers):
        path = f"{stem}layers.{i}"
        found.append(attention(f"{path}.self_attn", layer=i, layout=layout, **PACKED))
        found.append(feedforward(path, layer=i, layout=layout, **FED))
    return found


def decoder_truth(stem: str, layout: str, layers: int = 2) -> list[Expected]:
    found = encoder_truth(stem, layout, layers)
    for i in range(layers):
        path = f"{stem}layers.{i}.multihead_attn"
        found.append(attention(path, layer=i, kind="cross", layout=layout, **PACKED))
    return found


def parted(found: list[Expected]) -> Truth:
    """Attentions have a kind, feed-forwards have none."""
    return Truth(tuple(one for one in found if one.kind), tuple(one for one in found if not one.kind))


class Attends(nn.Module):
    """nn.MultiheadAttention on a residual stream; `weights`: it returns its scores too, which is another code path."""

    def __init__(self, weights: bool, **options: object) -> None:
        super().__init__()
        self.weights, self.norm = weights, nn.LayerNorm(D)
        self.mix = nn.MultiheadAttention(D, H, **options)

    def forward(self, x: Tensor, key: Tensor | None = None, value: Tensor | None = None) -> Tensor:
        y = self.norm(x)
        key = y if key is None else key
        return x + self.mix(y, key, key if value is None else value, need_weights=self.weights)[0]


def encoder(batch_first: bool, norm_first: bool) -> Entry:
    def build() -> nn.Module:
        layer = nn.TransformerEncoderLayer(D, H, FFN, batch_first=batch_first, norm_first=norm_first)
        return nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(D), enable_nested_tensor=False)

    def example() -> Example:
        return {"src": values(S, batch_first), "src_key_padding_mask": torch.zeros(B, S)}

    truth = parted(encoder_truth("", "pre" if norm_first else "post"))
    return entry(f"nn-encoder{suffix(batch_first, norm_first)}", "library", build, example, truth)


def decoder(batch_first: bool, norm_first: bool) -> Entry:
    def build() -> nn.Module:
        layer = nn.TransformerDecoderLayer(D, H, FFN, activation="gelu", batch_first=batch_first, norm_first=norm_first)
        return nn.TransformerDecoder(layer, 2)

    def example() -> Example:
        masks = {"tgt_mask": nn.Transformer.generate_square_subsequent_mask(S), "tgt_is_causal": True}
        return {"tgt": values(S, batch_first), "memory": values(M, batch_first), **masks}

    truth = parted(decoder_truth("", "pre" if norm_first else "post"))
    return entry(f"nn-decoder{suffix(batch_first, norm_first)}", "library", build, example, truth)


def transformer(batch_first: bool, norm_first: bool) -> Entry:
    def build() -> nn.Module:
        return nn.Transformer(D, H, 2, 2, FFN, batch_first=batch_first, norm_first=norm_first)

    def example() -> Example:
        return {"src": values(M, batch_first), "tgt": values(S, batch_first)}

    layout = "pre" if norm_first else "post"
    truth = parted([*encoder_truth("encoder.", layout), *decoder_truth("decoder.", layout)])
    return entry(f"nn-transformer{suffix(batch_first, norm_first)}", "library", build, example, truth)


def suffix(batch_first: bool, norm_first: bool) -> str:
    return f"-{'batch' if batch_first else 'length'}-first-{'pre' if norm_first else 'post'}"


def attends(name: str, weights: bool, cross: bool, roles: dict[str, str], **options: object) -> Entry:
    batch_first = bool(options.get("batch_first", False))
    wide, wider = options.get("kdim", D), options.get("vdim", D)

    def example() -> Example:
        memory = {"key": values(M, batch_first, int(str(wide))), "value": values(M, batch_first, int(str(wider)))}
        return {"x": values(S, batch_first)} | (memory if cross else {})

    truth = Truth((attention("mix", kind="cross" if cross else "self", layout="pre", **roles),), ())
    return entry(f"nn-attention-{name}", "library", lambda: Attends(weights, **options), example, truth)


FLAGS = list(itertools.product((True, False), repeat=2))
ENTRIES: list[Entry] = [
    *(encoder(*flags) for flags in FLAGS),
    *(decoder(*flags) for flags in FLAGS),
    *(transformer(*flags) for flags in FLAGS),
    attends("packed", False, False, PACKED, batch_first=True),
    attends("packed-weights", True, False, PACKED, batch_first=True),
    attends("packed-length-first", True, False, PACKED),
    attends("packed-memory", False, True, PACKED, batch_first=True),
    attends("packed-bias-kv", False, False, PACKED, batch_first=True, add_bias_kv=True, add_zero_attn=True),
    attends("apart", False, True, APART, batch_first=True, kdim=10, vdim=14),
    attends("apart-weights", True, True, APART, kdim=10, vdim=14),
]
