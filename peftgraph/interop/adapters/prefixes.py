"""Prefixes of the `adapters` library as passes, with their MLP or without.

One prefix serves all attentions of a kind: a flat one is (L, 2 N, G F), layer by layer its keys, then its values; the
last layer of an MLP has rows in that order, (2 N, G F, M). The layers are those that leave_out does not name, where a
decoder's are counted on from the encoder's.
Shapes: L length, N layers, G heads of keys, F features of one, M hidden.
Source: adapter-hub/adapters 1.3, methods/prefix_tuning.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor

from peftgraph.errors import AdapterError
from peftgraph.interop.adapters.saved import TENSORS, Saved
from peftgraph.interop.filling import COMMON, Filled, Key
from peftgraph.interop.selecting import selector_of
from peftgraph.rewrite.method import find_pass
from peftgraph.sites import Site, Sites

KINDS = {
    "encoder_prefix": ("encoder", "self"),
    "self_prefix": ("decoder", "self"),
    "cross_prefix": ("decoder", "cross"),
}
RELATIVE = ("t5", "mt5")
MLP = {"wte.weight": "embedding", "control_trans.0.weight": "down_weight", "control_trans.0.bias": "down_bias"}
LAST = {"control_trans.2.weight": "weight", "control_trans.2.bias": "bias"}
FLAT = "control_trans"


def prefixes(sites: Sites, saved: Saved) -> Filled:
    """The pass of a prefix.

    Raises:
        AdapterError: the model has other attentions, or the library's T5 has other biases with a prefix.
    """
    if saved.family in RELATIVE:
        raise AdapterError(
            f"{saved.directory} is a prefix of a {saved.family} model: there the library counts the prefix among the "
            "positions, so that tokens get other biases than the model was trained with; no pass does."
        )
    flat = saved.option("flat", bool)
    if not flat:
        saved.check({"non_linearity": "tanh"})
    tensors = next(iter(saved.at("prefix_tunings").values()))
    values: dict[Key, Tensor] = {}
    places: list[Site] = []
    for word in sorted({key.partition(".")[0] for key in tensors}):
        own = {key.partition(".")[2]: value for key, value in tensors.items() if key.startswith(f"{word}.")}
        cores = _attentions(sites, saved, word)
        values |= _rows(saved, cores, own) if flat else _through_mlp(saved, cores, own)
        places += cores
    values |= _gates(sites, saved)
    method = cast(Any, find_pass("prefix"))(
        at=selector_of(sites, places),
        length=saved.option("prefix_length", int),
        hidden=None if flat else saved.option("bottleneck_size", int),
        dropout=float(saved.option("dropout", float, int)),
    )
    return Filled(method, values)


def _attentions(sites: Sites, saved: Saved, word: str) -> list[Site]:
    """The attentions that a prefix serves, from the lowest on."""
    if word not in KINDS:
        raise AdapterError(f"{saved.directory / TENSORS} has a prefix for {word}; known are {', '.join(KINDS)}.")
    stack, kind = KINDS[word]
    found = [site for site in sites.select("attention.core") if site.kind == kind and site.stack in (None, stack)]
    below = {site.layer for site in sites.select("block") if site.stack == "encoder"} if stack == "decoder" else ()
    layers = {site.layer + len(below): site for site in found if site.layer is not None}
    kept = [layers[layer] for layer in sorted(layers) if layer not in saved.options.get("leave_out", ())]
    if len(layers) != len(found) or len({site.path for site in found}) != len(found) or not kept:
        raise AdapterError(
            f"{saved.directory} has a prefix for {word}, one in each of {len(kept)} layers; this model has "
            f"{len(found)} such attentions: {', '.join(site.id for site in found) or 'none'}."
        )
    return kept


def _rows(saved: Saved, cores: list[Site], own: Mapping[str, Tensor]) -> dict[Key, Tensor]:
    """P_K and P_V of each attention."""
    if own.keys() != {FLAT}:
        raise AdapterError(f"{saved.directory / TENSORS} has {', '.join(own)}, and not {FLAT} alone.")
    length = saved.option("prefix_length", int)
    rows = _cut(saved, own[FLAT].flatten(), (length, 2 * len(cores)))
    sides = [(i, site, side, letter) for i, site in enumerate(cores) for side, letter in enumerate("kv")]
    return {(site.id, f"prefix_{letter}"): rows[:, 2 * i + side] for i, site, side, letter in sides}


def _through_mlp(saved: Saved, cores: list[Site], own: Mapping[str, Tensor]) -> dict[Key, Tensor]:
    """The MLP that the attentions share, and their rows of its last layer."""
    family = "_".join(part for part in (cores[0].stack, cores[0].kind) if part)
    named = saved.named("prefix_tuning", own, MLP | LAST)
    last = {leaf: _cut(saved, named.pop(leaf), (2 * len(cores),)) for leaf in ("weight", "bias") if leaf in named}
    values: dict[Key, Tensor] = {(COMMON, f"{family}_{leaf}"): value for leaf, value in named.items()}
    for i, site in enumerate(cores):
        for side, letter in enumerate("kv"):
            values.update({(site.id, f"{letter}_{leaf}"): value[2 * i + side] for leaf, value in last.items()})
    return values


def _cut(saved: Saved, tensor: Tensor, parts: tuple[int, ...]) -> Tensor:
    """A tensor with its first axis cut into equal parts."""
    if tensor.shape[0] % math.prod(parts):
        raise AdapterError(
            f"{saved.directory / TENSORS} has a prefix of {tensor.shape[0]} rows, which are no keys and values of "
            f"{parts[-1] // 2} layers."
        )
    return tensor.unflatten(0, (*parts, -1))


def _gates(sites: Sites, saved: Saved) -> dict[Key, Tensor]:
    """The gates of a UniPELT."""
    if not saved.options.get("use_gating"):
        return {}
    saved.check({"shared_gating": True})
    values: dict[Key, Tensor] = {}
    for path, tensors in saved.at("prefix_gates").items():
        core = saved.site(sites, path.removesuffix(".prefix_tuning"), "attention.core")
        named = saved.named(path, tensors, {"weight": "prefix_gate_weight", "bias": "prefix_gate_bias"})
        values.update({(core.id, leaf): value for leaf, value in named.items()})
    return values
