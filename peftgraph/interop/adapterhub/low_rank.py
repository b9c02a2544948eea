"""Reads LoRA, its relatives and (IA)3 of the `adapters` library as passes.

The library's DoRA is a form of its own, which the pass `DoRA` has. Its VeRA trains whole matrices D and B' where the
paper has diagonals, between an A and a B that all modules share; its MTL-LoRA has a diagonal between A and several B,
of which it takes a weighted mean. Both are a LoRA once their factors are multiplied. In fused projections of GPT-2, A
and B of the chosen ones of q, k and v are stacked, and so are the rows of their gates. Its (IA)3 scales outputs of
projections; in the feed-forward that of the first projection, before the nonlinearity.
Source: adapter-hub/adapters 1.3, methods/lora.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from peftgraph.errors import AdapterError
from peftgraph.interop.adapterhub.saved_adapter import TENSORS, SavedAdapter
from peftgraph.interop.ia3_sites import describe_departures
from peftgraph.interop.parameter_names import DORA_MAGNITUDE, IA3_SCALE, LORA_A, LORA_B
from peftgraph.interop.site_selection import selector_for, sites_adapted_at
from peftgraph.ir.program import ProgramData
from peftgraph.passes import IA3, DoRA, LoRA
from peftgraph.rewrite.method import ParameterKey, PassWithValues
from peftgraph.sites import Site, Sites

NAMES = {
    "lora_A": LORA_A,
    "lora_B": LORA_B,
    "m.weight": DORA_MAGNITUDE,
    "gate.weight": "lora_gate_weight",
    "gate.bias": "lora_gate_bias",
}
FACTORS = "lora_A", "lora_B"  # by the library's names


def low_rank_pass(program: ProgramData, sites: Sites, saved: SavedAdapter) -> PassWithValues:
    """Return the pass of a LoRA or a DoRA; a gate replaces alpha / r.

    Raises:
        AdapterError: an option turns it into another method, or a module is no projection of this model.
    """
    values: dict[ParameterKey, Tensor] = {}
    adapted: list[Site] = []
    for path, tensors in saved.at("loras").items():
        chosen, named = _chosen(program, sites, path, saved), saved.named(path, _two_factors(saved, tensors), NAMES)
        if DORA_MAGNITUDE in named:
            named[DORA_MAGNITUDE] = named[DORA_MAGNITUDE].flatten()
        for i, site in enumerate(chosen):
            values.update({(site.id, leaf): value.chunk(len(chosen))[i] for leaf, value in named.items()})
        adapted += chosen
    rank, gated, dora = saved.option("r", int), bool(saved.options.get("use_gating")), saved.options.get("use_dora")
    if gated and dora:
        raise saved.refuse("use_dora and use_gating")
    options: dict[str, Any] = {
        "at": selector_for(sites, adapted),
        "rank": rank,
        "alpha": float(rank if gated else saved.option("alpha", float, int)),
        "dropout": float(saved.option("dropout", float, int)),
    }
    method = DoRA(**options, form="adapters", norm_gradient=True) if dora else LoRA(**options)
    return PassWithValues(method, values, _remark(saved))


def _two_factors(saved: SavedAdapter, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of one module, with more than two factors multiplied to A and B.

    VeRA: D A and B' B, with the A and B of all modules. MTL-LoRA: diag(l) A and the weighted mean of several B.
    """
    found = dict(tensors)
    if "vera_D" in found and "vera_B" in found:
        a_RI, b_OR = _shared_factors(saved)
        found |= {"lora_A": found.pop("vera_D") @ a_RI, "lora_B": found.pop("vera_B") @ b_OR}
    if {"task_specific.values", "weights", *FACTORS} <= found.keys():
        share_N = (found.pop("weights") / saved.option("weights_sharpness", float)).softmax(0)
        found["lora_A"] = found.pop("task_specific.values").unsqueeze(-1) * found["lora_A"]
        found["lora_B"] = torch.einsum("n,nor->or", share_N, found["lora_B"])
    return found


def _shared_factors(saved: SavedAdapter) -> list[Tensor]:
    """Return A and B, which all modules of a VeRA share.

    Raises:
        AdapterError: the file lacks them.
    """
    found = next(iter(saved.tensors.get("shared_parameters", {}).values()), {})
    if not found.keys() >= set(FACTORS):
        raise AdapterError(
            f"{saved.directory / TENSORS} lacks A and B, which all modules of a VeRA share: out of a model without a "
            "head the library does not save them, and draws others when it reads the files. Save the adapter out of "
            "one with a head, such as an AutoAdapterModel."
        )
    return [found[leaf] for leaf in FACTORS]


def _remark(saved: SavedAdapter) -> str:
    """Return the warning for an adapter that has more than two factors; "" for one that has two."""
    word = "an MTL-LoRA" if saved.options.get("architecture") == "mtl_lora" else "a VeRA"
    if word == "a VeRA" and saved.options.get("vera_d") is None and saved.options.get("vera_b") is None:
        return ""
    return (
        f"{saved.directory} is {word}, whose factors are multiplied out: it answers as it did, and trains on as a "
        f"{'DoRA' if saved.options.get('use_dora') else 'LoRA'}."
    )


def scale_pass(program: ProgramData, sites: Sites, saved: SavedAdapter) -> PassWithValues:
    """Return the pass of an (IA)3.

    Raises:
        AdapterError: an option turns it into another method, or a module is no projection of this model.
    """
    saved.check({"alpha": 1, "r": 1, "use_gating": False})
    found: dict[Site, Tensor] = {}
    for path, tensors in saved.at("loras").items():
        chosen = _chosen(program, sites, path, saved)
        if tensors.keys() != {"lora_B"}:
            raise AdapterError(f"{saved.directory}: {path} has {', '.join(tensors)}, and not one vector.")
        found.update((site, tensors["lora_B"].chunk(len(chosen))[i].flatten()) for i, site in enumerate(chosen))
    method = IA3(at=selector_for(sites, found))
    values: dict[ParameterKey, Tensor] = {(site.id, IA3_SCALE): scale for site, scale in found.items()}
    return PassWithValues(method, values, describe_departures(sites, saved.directory, found, ()))


def _chosen(program: ProgramData, sites: Sites, path: str, saved: SavedAdapter) -> list[Site]:
    """Return the adapted sites of one weight; of a fused one those of the chosen q, k and v, in that order.

    Raises:
        AdapterError: the parts of a fused weight are no contiguous thirds.
    """
    found = sites_adapted_at(program, sites, _weight(program, path), saved.directory)
    if found[0].columns is None:
        return found
    chosen = [site for site in found if site.role.rpartition(".")[2] in saved.options.get("attn_matrices", ())]
    thirds = all(site.columns is not None and site.columns.contiguous for site in found)
    if not thirds or not chosen or len({site.op for site in found}) != 1:
        raise AdapterError(
            f"{saved.directory} adapts parts of {path}, which the library takes for contiguous thirds; they are "
            f"{', '.join(f'{site.id} ({site.columns})' for site in found)}."
        )
    return sorted(chosen, key=lambda site: site.columns.starts_at if site.columns is not None else 0)


def _weight(program: ProgramData, path: str) -> str:
    """Return this model's name of a module's weight; the module's path may begin with the name of the base model, or
    lack it."""
    own = f"{path}.weight"
    inner = own.partition(".")[2]
    ending = [name for name in program.table if name.endswith(f".{own}")]
    candidates = [name for name in (own, inner) if name in program.table]
    return candidates[0] if candidates else ending[0] if len(ending) == 1 else own
