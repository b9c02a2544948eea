"""Reads bottlenecks of the `adapters` library as passes: serial, parallel, after the residual sum, and Compacter's.

After a sublayer they are Houlsby's, on the residual sum Pfeiffer's, after the sum (and its norm) Adapter+'s. Compacters
are at one of the first two. A scale that the pass does not have is multiplied into the up projection. The rule A of a
Compacter's Kronecker products is shared by the adapter or belongs to each projection; where the library stores it as a
product of two thin matrices, the product is computed: A_i = L_i R_i.
Source: adapter-hub/adapters 1.3, methods/bottleneck.py, methods/modeling.py (Adapter, PHMLayer).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from peftgraph.errors import AdapterError
from peftgraph.interop.adapterhub.saved_adapter import CONFIG, TENSORS, SavedAdapter
from peftgraph.interop.site_selection import selector_for
from peftgraph.passes import AdapterPlus, Compacter, CompacterPP, Houlsby, ParallelAdapter, Pfeiffer
from peftgraph.rewrite.method import SHARED, ParameterKey, Pass, PassWithValues
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
# Options whose other values are other methods.
FORM = {
    "adapter_residual_before_ln": False, "ln_after": False, "ln_before": False,
}  # fmt: skip
AROUND = {"original_ln_after": True, "residual_before_ln": True, "stochastic_depth": 0.0}
AFTER_SUM = {"original_ln_before": True, "residual_before_ln": False, "use_gating": False}


def bottleneck_pass(sites: Sites, saved: SavedAdapter) -> PassWithValues:
    """Return the pass of a bottleneck configuration.

    Raises:
        AdapterError: an option turns it into another method, or it is at no sublayer of this model.
    """
    saved.check(FORM)
    if saved.options.get("original_ln_after") is False and not saved.options.get("is_parallel"):
        return _after_sum(sites, saved)
    saved.check(AROUND)
    if saved.options.get("phm_layer"):
        return _compacter(sites, saved)
    adapters = _by_site(sites, saved, NAMES)
    options = _common(sites, saved, adapters)
    if saved.options.get("is_parallel"):
        if saved.options.get("scaling") == "channel":
            return _scaled(saved, ParallelAdapter(**options, input="residual", scale=1.0), adapters)
        method = ParallelAdapter(**options, **_scale(saved), input="residual")
        return PassWithValues(method, _values(adapters, method.word))
    if saved.options.get("original_ln_before"):
        return _scaled(saved, Pfeiffer(**options), adapters)
    return _scaled(saved, Houlsby(**options, norms=False), adapters)


def _after_sum(sites: Sites, saved: SavedAdapter) -> PassWithValues:
    """Return an Adapter+; a single scale becomes equal scales of all features."""
    saved.check(AFTER_SUM | {"phm_layer": False})
    adapters = _by_site(sites, saved, NAMES)
    drop_path = float(saved.option("stochastic_depth", float, int))
    method = AdapterPlus(**_common(sites, saved, adapters), drop_path=drop_path)
    scaled = {site: {**tensors, "scale": _factor(saved, tensors).expand(len(tensors["up_bias"]))}
              for site, tensors in adapters.items()}  # fmt: skip
    remark = "" if saved.options.get("scaling") == "channel" else _remark(saved, "trains on as one for each feature")
    return PassWithValues(method, _values(scaled), remark)


def _scaled(saved: SavedAdapter, method: Pass, adapters: Mapping[Site, Mapping[str, Tensor]]) -> PassWithValues:
    """Return a pass without a scale of its own, with the scale multiplied into its up projection."""
    if saved.options.get("scaling") == 1.0:
        return PassWithValues(method, _values(adapters, method.word))
    scaled: dict[Site, dict[str, Tensor]] = {}
    for site, tensors in adapters.items():
        factor = _factor(saved, tensors)
        scaled[site] = {leaf: value for leaf, value in tensors.items() if leaf != "scale"}
        scaled[site] |= {"up_weight": factor.unsqueeze(-1) * tensors["up_weight"]}
        scaled[site] |= {"up_bias": factor * tensors["up_bias"]}
    return PassWithValues(method, _values(scaled, method.word), _remark(saved, "is multiplied into the up projection"))


def _factor(saved: SavedAdapter, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the scale of one adapter, (1,) or (D,).

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


def _remark(saved: SavedAdapter, what: str) -> str:
    """Return the warning that a scale is expressed in another way."""
    return f"{saved.directory} has scaling={saved.options.get('scaling')!r}, which {what}: it answers as it did."


def _compacter(sites: Sites, saved: SavedAdapter) -> PassWithValues:
    """Return a Compacter, with one shared rule or one for each projection."""
    saved.check({"is_parallel": False, "phm_bias": True, "scaling": 1.0, "shared_W_phm": False, "use_gating": False})
    adapters = {site: _whole_rules(tensors) for site, tensors in _by_site(sites, saved, COMPACT).items()}
    options = _common(sites, saved, adapters)
    shared, serial = saved.option("shared_phm_rule", bool), not saved.options.get("original_ln_before")
    options |= {"n": saved.option("phm_dim", int), "shared": shared, "norms": False, "init": "xavier_normal"}
    options["rank"] = saved.option("phm_rank", int) if saved.option("factorized_phm_W", bool) else None
    options["place"] = "after_dropout" if serial else "residual_sum"
    common: dict[ParameterKey, Tensor] = {(SHARED, "phm_rule"): _rule(saved)} if shared else {}
    method = Compacter(**options) if serial else CompacterPP(**options)
    return PassWithValues(method, _values(adapters) | common)


def _rule(saved: SavedAdapter) -> Tensor:
    """Return the rule that all projections share.

    Raises:
        AdapterError: the file lacks it.
    """
    found = next(iter(saved.tensors.get("shared_parameters", {}).values()), {})
    if "phm_rule" in found:
        return found["phm_rule"]
    if {"phm_rule_left", "phm_rule_right"} <= found.keys():
        return torch.bmm(found["phm_rule_left"], found["phm_rule_right"])
    raise AdapterError(
        f"{saved.directory / TENSORS} lacks the rule that its Compacters share: out of a model without a head the "
        "library does not save it. Save the adapter out of one with a head, such as an AutoAdapterModel."
    )


def _whole_rules(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of one adapter, with the two factors of each rule multiplied."""
    whole = dict(tensors)
    for side in ("down", "up"):
        factors = [whole.pop(f"{side}_rule_{end}", None) for end in ("left", "right")]
        if factors[0] is not None and factors[1] is not None:
            whole[f"{side}_rule"] = torch.bmm(factors[0], factors[1])
    return whole


def _by_site(sites: Sites, saved: SavedAdapter, names: Mapping[str, str]) -> dict[Site, dict[str, Tensor]]:
    """Return the tensors of the adapters by site and by our names."""
    return {
        saved.site(sites, path, "attention", "ffn"): saved.named(path, tensors, names)
        for path, tensors in saved.at("adapters").items()
    }


def _values(adapters: Mapping[Site, Mapping[str, Tensor]], word: str = "") -> dict[ParameterKey, Tensor]:
    """Return the values by site; the names of gates begin with the word of the pass that they gate."""
    named = {leaf: f"{word}_{leaf}" if leaf.startswith("gate_") else leaf for one in adapters.values() for leaf in one}
    return {(site.id, named[leaf]): value for site, tensors in adapters.items() for leaf, value in tensors.items()}


def _common(sites: Sites, saved: SavedAdapter, adapters: Mapping[Site, Mapping[str, Tensor]]) -> dict[str, Any]:
    """Return the options that all bottlenecks have.

    Raises:
        AdapterError: they have several widths.
    """
    widths = {len(tensors["down_bias"]) for tensors in adapters.values() if "down_bias" in tensors}
    if len(widths) != 1:
        raise saved.refuse(f"bottlenecks of the widths {sorted(widths)}")
    dropout = float(saved.option("dropout", float, int))
    options: dict[str, Any] = {"at": selector_for(sites, adapters), "width": widths.pop(), "dropout": dropout}
    return options | {"activation": saved.activation()}


def _scale(saved: SavedAdapter) -> dict[str, Any]:
    """Return the options of a parallel adapter's scale."""
    if saved.options.get("scaling") == "learned":
        return {"scale": 1.0, "learned": True}
    return {"scale": float(saved.option("scaling", float, int)), "learned": False}
