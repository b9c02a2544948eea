"""Prefixes of the `adapters` library as passes, with their MLP or without.

One prefix serves all attentions of a kind: a flat one is (L, 2 N, G F), layer by layer its keys, then its values; the
last layer of an MLP has rows in that order, (2 N, G F, M). The layers are those that leave_out does not name, where a
decoder's are counted on from the encoder's.
T5 works the biases of the distance out in the first self-attention of a stack, b(j - i) for query i and key j of
[P_K; K], and the others are given them. One that is given biases of other than its own number of keys has none to put
in their place, and adds its mask alone; so do those above it.
Shapes: L length, N layers, G heads of keys, F features of one, M hidden.
Source: adapter-hub/adapters 1.3, methods/prefix_tuning.py; models/t5/modeling_t5.py (T5AttentionWithAdapters).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor

from peftgraph.errors import AdapterError
from peftgraph.interop.adapterhub.saved import TENSORS, Saved
from peftgraph.interop.filling import COMMON, Filled, Key
from peftgraph.interop.selecting import selector_of
from peftgraph.rewrite.registry import find_pass
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


def prefixes(sites: Sites, saved: Saved) -> list[Filled]:
    """The pass of a prefix; two where a T5 has biases in one of its stacks only.

    Raises:
        AdapterError: the model has other attentions, or T5 has one without a prefix above one that has it.
    """
    flat = saved.option("flat", bool)
    if not flat:
        saved.check({"non_linearity": "tanh"})
    tensors = next(iter(saved.at("prefix_tunings").values()))
    served = {word: _attentions(sites, saved, word) for word in sorted({key.partition(".")[0] for key in tensors})}
    biases = {word: _biases(sites, saved, word, cores) for word, cores in served.items()}
    gates = _gates(sites, saved)
    filled: list[Filled] = []
    for kind in dict.fromkeys(biases.values()):
        places: list[Site] = []
        values: dict[Key, Tensor] = {}
        for word in (word for word in served if biases[word] == kind):
            own = {key.partition(".")[2]: value for key, value in tensors.items() if key.startswith(f"{word}.")}
            values |= _rows(saved, served[word], own) if flat else _through_mlp(saved, served[word], own)
            places += served[word]
        name = kind if filled else ""
        method = cast(Any, find_pass("prefix"))(
            at=selector_of(sites, places),
            length=saved.option("prefix_length", int),
            hidden=None if flat else saved.option("bottleneck_size", int),
            dropout=float(saved.option("dropout", float, int)),
            biases=kind,
            name=name,
        )
        who = f"prefix_{name}" if name else "prefix"
        ids = {site.id for site in places}
        values |= {(site, f"{who}_gate_{leaf}"): value for (site, leaf), value in gates.items() if site in ids}
        filled.append(Filled(method, values))
    return filled


def _biases(sites: Sites, saved: Saved, word: str, cores: list[Site]) -> str:
    """What becomes of the model's biases of the distance in the attentions that a prefix serves.

    Raises:
        AdapterError: an attention above them, which no prefix serves, loses its biases.
    """
    stack, kind = KINDS[word]
    if saved.family not in RELATIVE:
        return "kept"
    layers = [site.layer for site in _found(sites, stack, "self") if site.layer is not None]
    prefixed = {site.layer for site in cores if site.layer is not None}
    bare = [layer for layer in layers if layer not in prefixed]
    lost = [layer for layer in bare if layer > min(prefixed)]
    if lost and kind == "self":
        raise AdapterError(
            f"{saved.directory} leaves layer {lost[0]} of the {stack} without a prefix, above one that has it. The "
            f"library's {saved.family} adds no biases of the distance to the attention there, for those below are of "
            "another length, and there is no pass for an attention without a prefix that loses its biases."
        )
    return "dropped" if bare else "shifted"


def _attentions(sites: Sites, saved: Saved, word: str) -> list[Site]:
    """The attentions that a prefix serves, from the lowest on."""
    if word not in KINDS:
        raise AdapterError(f"{saved.directory / TENSORS} has a prefix for {word}; known are {', '.join(KINDS)}.")
    stack, kind = KINDS[word]
    found = _found(sites, stack, kind)
    below = {site.layer for site in sites.select("block") if site.stack == "encoder"} if stack == "decoder" else ()
    layers = {site.layer + len(below): site for site in found if site.layer is not None}
    kept = [layers[layer] for layer in sorted(layers) if layer not in saved.options.get("leave_out", ())]
    if len(layers) != len(found) or len({site.path for site in found}) != len(found) or not kept:
        raise AdapterError(
            f"{saved.directory} has a prefix for {word}, one in each of {len(kept)} layers; this model has "
            f"{len(found)} such attentions: {', '.join(site.id for site in found) or 'none'}."
        )
    return kept


def _found(sites: Sites, stack: str, kind: str) -> list[Site]:
    """The attentions of a kind."""
    return [site for site in sites.select("attention.core") if site.kind == kind and site.stack in (None, stack)]


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


def _gates(sites: Sites, saved: Saved) -> dict[tuple[str, str], Tensor]:
    """The gates of a UniPELT, by their sites: "weight" and "bias"."""
    if not saved.options.get("use_gating"):
        return {}
    saved.check({"shared_gating": True})
    values: dict[tuple[str, str], Tensor] = {}
    for path, tensors in saved.at("prefix_gates").items():
        core = saved.site(sites, path.removesuffix(".prefix_tuning"), "attention.core")
        named = saved.named(path, tensors, {"weight": "weight", "bias": "bias"})
        values.update({(core.id, leaf): value for leaf, value in named.items()})
    return values
