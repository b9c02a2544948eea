"""Bottlenecks of the `adapters` library as passes: serial, parallel, behind the residual sum, and those of Compacter.

After a sublayer they are Houlsby's, on the residual sum Pfeiffer's, behind it (and its norm) Adapter+; a Compacter
stands at the first two places. A scale that the pass does not have is multiplied into the up projection. The
rule A of all its Kronecker products is either the adapter's own, or each projection's; where the library keeps it as a
product of two thin matrices it is multiplied out: A_i = L_i R_i.
Source: adapter-hub/adapters 1.3, methods/bottleneck.py, methods/modeling.py (Adapter, PHMLayer).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from peftgraph.errors import AdapterError
from peftgraph.interop.adapterhub.saved import TENSORS, Saved
from peftgraph.interop.filling import COMMON, Filled, Key
from peftgraph.interop.peft.config import CONFIG
from peftgraph.interop.selecting import selector_of
from peftgraph.rewrite.method import Pass
from peftgraph.rewrite.registry import find_pass
from peftgraph.sites import Site, Sites

NAMES = {
    "adapter_down.0.weight": "down_weight",
    "adapter_down.0.bias": "down_bias",
    "adapter_up.weight": "up_weight",
    "adapter_up.bias": "up_bias",
    "scaling": "scale",
    "gate.weight": "gate_weight",
    "gate.bias": "gate_bias",
}
PARTS = {"W_left": "left", "W_right": "right", "W": "weight", "b": "bias", "phm_rule": "rule",
         "phm_rule_left": "rule_left", "phm_rule_right": "rule_right"}  # fmt: skip
COMPACT = {f"adapter_{side}.{leaf}": f"{side.partition('.')[0]}_{ours}" for side in ("down.0", "up")
           for leaf, ours in PARTS.items()}  # fmt: skip
# options whose other values are other methods
FORM = {
    "adapter_residual_before_ln": False, "ln_after": False, "ln_before": False,
}  # fmt: skip
AROUND = {"original_ln_after": True, "residual_before_ln": True, "stochastic_depth": 0.0}
BEHIND = {"original_ln_before": True, "residual_before_ln": False, "use_gating": False}


def bottlenecks(sites: Sites, saved: Saved) -> Filled:
    """The pass of a bottleneck configuration.

    Raises:
        AdapterError: an option makes another method of it, or a place is no sublayer of this model.
    """
    saved.check(FORM)
    if saved.options.get("original_ln_after") is False and not saved.options.get("is_parallel"):
        return _behind(sites, saved)
    saved.check(AROUND)
    if saved.options.get("phm_layer"):
        return _compacter(sites, saved)
    places = _places(sites, saved, NAMES)
    options = _common(sites, saved, places)
    if saved.options.get("is_parallel"):
        if saved.options.get("scaling") == "channel":
            return _scaled(saved, "parallel_adapter", options | {"input": "residual", "scale": 1.0}, places)
        options |= _scale(saved) | {"input": "residual"}
        return Filled(_made("parallel_adapter", options), _values(places, "parallel_adapter"))
    if saved.options.get("original_ln_before"):
        return _scaled(saved, "pfeiffer", options, places)
    return _scaled(saved, "houlsby", options | {"norms": False}, places)


def _behind(sites: Sites, saved: Saved) -> Filled:
    """An Adapter+; one scale for all features is as many equal ones."""
    saved.check(BEHIND | {"phm_layer": False})
    places = _places(sites, saved, NAMES)
    drop_path = float(saved.option("stochastic_depth", float, int))
    method = _made("adapter_plus", _common(sites, saved, places) | {"drop_path": drop_path})
    alike = {site: {**tensors, "scale": _factor(saved, tensors).expand(len(tensors["up_bias"]))}
             for site, tensors in places.items()}  # fmt: skip
    remark = "" if saved.options.get("scaling") == "channel" else _remark(saved, "trains on as one for each feature")
    return Filled(method, _values(alike), remark)


def _scaled(saved: Saved, word: str, options: Mapping[str, Any], places: Mapping[Site, Mapping[str, Tensor]]) -> Filled:
    """A pass without a scale, whose up projection has it in it."""
    if saved.options.get("scaling") == 1.0:
        return Filled(_made(word, options), _values(places, word))
    inside: dict[Site, dict[str, Tensor]] = {}
    for site, tensors in places.items():
        factor = _factor(saved, tensors)
        inside[site] = {leaf: value for leaf, value in tensors.items() if leaf != "scale"}
        inside[site] |= {"up_weight": factor.unsqueeze(-1) * tensors["up_weight"]}
        inside[site] |= {"up_bias": factor * tensors["up_bias"]}
    return Filled(_made(word, options), _values(inside, word), _remark(saved, "is multiplied into the up projection"))


def _factor(saved: Saved, tensors: Mapping[str, Tensor]) -> Tensor:
    """The scale of one adapter, (1,) or (D,).

    Raises:
        AdapterError: tensors are missing.
    """
    if not tensors.keys() >= {"up_weight", "up_bias"}:
        raise AdapterError(f"{saved.directory / TENSORS} lacks up projections.")
    if saved.options.get("scaling") not in ("learned", "channel"):
        return tensors["up_bias"].new_full((1,), float(saved.option("scaling", float, int)))
    if "scale" not in tensors:
        raise AdapterError(f"{saved.directory / TENSORS} lacks the scale that {CONFIG} speaks of.")
    return tensors["scale"]


def _remark(saved: Saved, what: str) -> str:
    return f"{saved.directory} has scaling={saved.options.get('scaling')!r}, which {what}: it answers as it did."


def _compacter(sites: Sites, saved: Saved) -> Filled:
    """A Compacter, with one rule or with one for each projection."""
    saved.check({"is_parallel": False, "phm_bias": True, "scaling": 1.0, "shared_W_phm": False, "use_gating": False})
    places = {site: _multiplied(tensors) for site, tensors in _places(sites, saved, COMPACT).items()}
    options = _common(sites, saved, places)
    shared, serial = saved.option("shared_phm_rule", bool), not saved.options.get("original_ln_before")
    options |= {"n": saved.option("phm_dim", int), "shared": shared, "norms": False, "init": "xavier_normal"}
    options["rank"] = saved.option("phm_rank", int) if saved.option("factorized_phm_W", bool) else None
    options["place"] = "after_dropout" if serial else "residual_sum"
    common: dict[Key, Tensor] = {(COMMON, "phm_rule"): _rule(saved)} if shared else {}
    return Filled(_made("compacter" if serial else "compacter_pp", options), _values(places) | common)


def _rule(saved: Saved) -> Tensor:
    """The rule that all projections share."""
    found = next(iter(saved.tensors.get("shared_parameters", {}).values()), {})
    if "phm_rule" in found:
        return found["phm_rule"]
    if {"phm_rule_left", "phm_rule_right"} <= found.keys():
        return torch.bmm(found["phm_rule_left"], found["phm_rule_right"])
    raise AdapterError(
        f"{saved.directory / TENSORS} lacks the rule that its Compacters share: out of a model without a head the "
        "library does not save it. Save the adapter out of one with a head, such as an AutoAdapterModel."
    )


def _multiplied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one adapter, with each rule in the place of its two factors."""
    whole = dict(tensors)
    for side in ("down", "up"):
        factors = [whole.pop(f"{side}_rule_{end}", None) for end in ("left", "right")]
        if factors[0] is not None and factors[1] is not None:
            whole[f"{side}_rule"] = torch.bmm(factors[0], factors[1])
    return whole


def _places(sites: Sites, saved: Saved, names: Mapping[str, str]) -> dict[Site, dict[str, Tensor]]:
    """The adapters by site, with our names."""
    return {
        saved.site(sites, path, "attention", "ffn"): saved.named(path, tensors, names)
        for path, tensors in saved.at("adapters").items()
    }


def _values(places: Mapping[Site, Mapping[str, Tensor]], word: str = "") -> dict[Key, Tensor]:
    """The values by site; those of gates have the word of what they let in before their names."""
    named = {leaf: f"{word}_{leaf}" if leaf.startswith("gate_") else leaf for one in places.values() for leaf in one}
    return {(site.id, named[leaf]): value for site, tensors in places.items() for leaf, value in tensors.items()}


def _common(sites: Sites, saved: Saved, places: Mapping[Site, Mapping[str, Tensor]]) -> dict[str, Any]:
    """The options that all bottlenecks have."""
    widths = {len(tensors["down_bias"]) for tensors in places.values() if "down_bias" in tensors}
    if len(widths) != 1:
        raise saved.refuse(f"bottlenecks of the widths {sorted(widths)}")
    dropout = float(saved.option("dropout", float, int))
    options: dict[str, Any] = {"at": selector_of(sites, places), "width": widths.pop(), "dropout": dropout}
    return options | {"activation": saved.activation()}


def _scale(saved: Saved) -> dict[str, Any]:
    if saved.options.get("scaling") == "learned":
        return {"scale": 1.0, "learned": True}
    return {"scale": float(saved.option("scaling", float, int)), "learned": False}


def _made(word: str, options: Mapping[str, Any]) -> Pass:
    return cast(Any, find_pass(word))(**options)
