"""Reads prefixes of the `adapters` library as passes, with their MLP or without.

One prefix serves all attentions of a kind: without an MLP it is (L, 2 N, G F), layer by layer its keys, then its
values; the last layer of an MLP has rows in that order, (2 N, G F, M). The layers are those that leave_out does not
name; a decoder's layers are numbered after the encoder's.
T5 computes the biases of the distance in the first self-attention of a stack, b(j - i) for query i and key j of
[P_K; K], and passes them on to the others. An attention that receives biases for another number of keys than its own
adds its mask alone; so do those above it.
Shapes: L length, N layers, G heads of keys, F features of one, M hidden.
Source: adapter-hub/adapters 1.3, methods/prefix_tuning.py; models/t5/modeling_t5.py (T5AttentionWithAdapters).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from peftgraph.errors import AdapterError
from peftgraph.interop.adapterhub.saved_adapter import TENSORS, SavedAdapter
from peftgraph.interop.parameter_names import PREFIX_KEYS, PREFIX_VALUES
from peftgraph.interop.site_selection import selector_for
from peftgraph.passes import Prefix
from peftgraph.rewrite.method import SHARED, ParameterKey, PassWithValues
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
Biases = Literal["kept", "shifted", "dropped"]


def prefix_passes(sites: Sites, saved: SavedAdapter) -> list[PassWithValues]:
    """Return the pass of a prefix; two passes where a T5 has biases in only one of its stacks.

    Raises:
        AdapterError: the model has other attentions, or a T5 has one without a prefix above one with a prefix.
    """
    flat = saved.option("flat", bool)
    if not flat:
        saved.check({"non_linearity": "tanh"})
    tensors, *_ = saved.at("prefix_tunings").values()
    served = {word: _attentions(sites, saved, word) for word in sorted({key.partition(".")[0] for key in tensors})}
    biases: dict[str, Biases] = {word: _biases(sites, saved, word, cores) for word, cores in served.items()}
    gates = _gates(sites, saved)
    found: list[PassWithValues] = []
    for kind in dict.fromkeys(biases.values()):
        cores: list[Site] = []
        values: dict[ParameterKey, Tensor] = {}
        for word in (word for word in served if biases[word] == kind):
            own = {key.partition(".")[2]: value for key, value in tensors.items() if key.startswith(f"{word}.")}
            values |= _rows(saved, served[word], own) if flat else _through_mlp(saved, served[word], own)
            cores += served[word]
        name = kind if found else ""
        method = Prefix(
            at=selector_for(sites, cores),
            length=saved.option("prefix_length", int),
            hidden=None if flat else saved.option("bottleneck_size", int),
            dropout=float(saved.option("dropout", float, int)),
            biases=kind,
            name=name,
        )
        who = f"prefix_{name}" if name else "prefix"
        ids = {site.id for site in cores}
        values |= {(site, f"{who}_gate_{leaf}"): value for (site, leaf), value in gates.items() if site in ids}
        found.append(PassWithValues(method, values))
    return found


def _biases(sites: Sites, saved: SavedAdapter, word: str, cores: list[Site]) -> Biases:
    """Return how the model's relative position biases are treated in the attentions that have a prefix.

    Raises:
        AdapterError: an attention without a prefix, above one with a prefix, loses its biases.
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


def _attentions(sites: Sites, saved: SavedAdapter, word: str) -> list[Site]:
    """Return the attentions that a prefix applies to, from the lowest on.

    Raises:
        AdapterError: the model does not have one attention of the kind in each layer.
    """
    if word not in KINDS:
        raise AdapterError(f"{saved.directory / TENSORS} has a prefix for {word}; known are {', '.join(KINDS)}.")
    stack, kind = KINDS[word]
    found = _found(sites, stack, kind)
    encoder = {site.layer for site in sites.select("block") if site.stack == "encoder"} if stack == "decoder" else ()
    layers = {site.layer + len(encoder): site for site in found if site.layer is not None}
    kept = [layers[layer] for layer in sorted(layers) if layer not in saved.options.get("leave_out", ())]
    if len(layers) != len(found) or len({site.path for site in found}) != len(found) or not kept:
        raise AdapterError(
            f"{saved.directory} has a prefix for {word}, one in each of {len(kept)} layers; this model has "
            f"{len(found)} such attentions: {', '.join(site.id for site in found) or 'none'}."
        )
    return kept


def _found(sites: Sites, stack: str, kind: str) -> list[Site]:
    """Return the attentions of a kind."""
    return [site for site in sites.select("attention.core") if site.kind == kind and site.stack in (None, stack)]


def _rows(saved: SavedAdapter, cores: list[Site], own: Mapping[str, Tensor]) -> dict[ParameterKey, Tensor]:
    """Return P_K and P_V of each attention."""
    if own.keys() != {FLAT}:
        raise AdapterError(f"{saved.directory / TENSORS} has {', '.join(own)}, and not {FLAT} alone.")
    length = saved.option("prefix_length", int)
    rows = _cut(saved, own[FLAT].flatten(), (length, 2 * len(cores)))
    sides = [
        (i, site, side, leaf) for i, site in enumerate(cores) for side, leaf in enumerate((PREFIX_KEYS, PREFIX_VALUES))
    ]
    return {(site.id, leaf): rows[:, 2 * i + side] for i, site, side, leaf in sides}


def _through_mlp(saved: SavedAdapter, cores: list[Site], own: Mapping[str, Tensor]) -> dict[ParameterKey, Tensor]:
    """Return the MLP that the attentions share, and the rows of its last layer for each of them."""
    family = "_".join(part for part in (cores[0].stack, cores[0].kind) if part)
    named = saved.named("prefix_tuning", own, MLP | LAST)
    last = {leaf: _cut(saved, named.pop(leaf), (2 * len(cores),)) for leaf in ("weight", "bias") if leaf in named}
    values: dict[ParameterKey, Tensor] = {(SHARED, f"{family}_{leaf}"): value for leaf, value in named.items()}
    for i, site in enumerate(cores):
        for side, letter in enumerate("kv"):
            values.update({(site.id, f"{letter}_{leaf}"): value[2 * i + side] for leaf, value in last.items()})
    return values


def _cut(saved: SavedAdapter, tensor: Tensor, parts: tuple[int, ...]) -> Tensor:
    """Cut the first axis of a tensor into equal parts.

    Raises:
        AdapterError: its size is not divisible.
    """
    if tensor.shape[0] % math.prod(parts):
        raise AdapterError(
            f"{saved.directory / TENSORS} has a prefix of {tensor.shape[0]} rows, which are no keys and values of "
            f"{parts[-1] // 2} layers."
        )
    return tensor.unflatten(0, (*parts, -1))


def _gates(sites: Sites, saved: SavedAdapter) -> dict[tuple[str, str], Tensor]:
    """Return the gates of a UniPELT, by their sites: "weight" and "bias"."""
    if not saved.options.get("use_gating"):
        return {}
    saved.check({"shared_gating": True})
    values: dict[tuple[str, str], Tensor] = {}
    for path, tensors in saved.at("prefix_gates").items():
        core = saved.site(sites, path.removesuffix(".prefix_tuning"), "attention.core")
        named = saved.named(path, tensors, {"weight": "weight", "bias": "bias"})
        values.update({(core.id, leaf): value for leaf, value in named.items()})
    return values
