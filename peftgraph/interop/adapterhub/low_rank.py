"""LoRA, its kin and (IA)3 of the `adapters` library as passes.

Its DoRA is a form of its own, which `DoRA` has. What it calls VeRA trains whole matrices D and B' where the paper has
diagonals, between an A and a B that all modules share; MTL-LoRA has a diagonal between A and several B, whose mean it
weighs. Both are products of two factors: a LoRA, once they are multiplied out. In its fused projections of GPT-2, A and
B of the chosen of q, k and v lie one below the other, and so do the rows of their gates; its (IA)3 scales what a
projection gives, in the feed-forward the first, before the nonlinearity.
Source: adapter-hub/adapters 1.3, methods/lora.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from peftgraph.errors import AdapterError
from peftgraph.interop.adapterhub.saved import TENSORS, Saved
from peftgraph.interop.filling import Filled, Key
from peftgraph.interop.peft.scales import departures
from peftgraph.interop.selecting import adapted_sites, selector_of
from peftgraph.ir.program import ProgramData
from peftgraph.rewrite.registry import find_pass
from peftgraph.sites import Site, Sites

NAMES = {
    "lora_A": "lora_A",
    "lora_B": "lora_B",
    "m.weight": "dora_m",
    "gate.weight": "lora_gate_weight",
    "gate.bias": "lora_gate_bias",
}
SHARED = "lora_A", "lora_B"  # of VeRA, for the whole model


def low_rank(program: ProgramData, sites: Sites, saved: Saved) -> Filled:
    """The pass of a LoRA or a DoRA; a gate stands in the place of alpha / r.

    Raises:
        AdapterError: an option makes another method of it, or a module is no projection of this model.
    """
    values: dict[Key, Tensor] = {}
    places: list[Site] = []
    for path, tensors in saved.at("loras").items():
        chosen, named = _chosen(program, sites, path, saved), saved.named(path, _two_factors(saved, tensors), NAMES)
        if "dora_m" in named:
            named["dora_m"] = named["dora_m"].flatten()
        for i, site in enumerate(chosen):
            values.update({(site.id, leaf): value.chunk(len(chosen))[i] for leaf, value in named.items()})
        places += chosen
    rank, gated, dora = saved.option("r", int), bool(saved.options.get("use_gating")), saved.options.get("use_dora")
    if gated and dora:
        raise saved.refuse("use_dora and use_gating")
    options: dict[str, Any] = {"form": "adapters", "norm_gradient": True} if dora else {}
    method = cast(Any, find_pass("dora" if dora else "lora"))(
        at=selector_of(sites, places),
        rank=rank,
        alpha=float(rank if gated else saved.option("alpha", float, int)),
        dropout=float(saved.option("dropout", float, int)),
        **options,
    )
    return Filled(method, values, _remark(saved))


def _two_factors(saved: Saved, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one module, with more than two factors multiplied out to A and B.

    VeRA: D A and B' B, with the A and B of all modules. MTL-LoRA: diag(l) A and the weighted mean of several B.
    """
    found = dict(tensors)
    if "vera_D" in found and "vera_B" in found:
        a_RI, b_OR = _shared(saved)
        found |= {"lora_A": found.pop("vera_D") @ a_RI, "lora_B": found.pop("vera_B") @ b_OR}
    if {"task_specific.values", "weights", *SHARED} <= found.keys():
        share_N = (found.pop("weights") / saved.option("weights_sharpness", float)).softmax(0)
        found["lora_A"] = found.pop("task_specific.values").unsqueeze(-1) * found["lora_A"]
        found["lora_B"] = torch.einsum("n,nor->or", share_N, found["lora_B"])
    return found


def _shared(saved: Saved) -> list[Tensor]:
    """A and B of all modules of a VeRA."""
    found = next(iter(saved.tensors.get("shared_parameters", {}).values()), {})
    if not found.keys() >= set(SHARED):
        raise AdapterError(
            f"{saved.directory / TENSORS} lacks A and B, which all modules of a VeRA share: out of a model without a "
            "head the library does not save them, and draws others when it reads the files. Save the adapter out of "
            "one with a head, such as an AutoAdapterModel."
        )
    return [found[leaf] for leaf in SHARED]


def _remark(saved: Saved) -> str:
    """What to say of an adapter that has more factors than two."""
    word = "an MTL-LoRA" if saved.options.get("architecture") == "mtl_lora" else "a VeRA"
    if word == "a VeRA" and saved.options.get("vera_d") is None and saved.options.get("vera_b") is None:
        return ""
    return (
        f"{saved.directory} is {word}, whose factors are multiplied out: it answers as it did, and trains on as a "
        f"{'DoRA' if saved.options.get('use_dora') else 'LoRA'}."
    )


def scales(program: ProgramData, sites: Sites, saved: Saved) -> Filled:
    """The pass of an (IA)3.

    Raises:
        AdapterError: as `low_rank`.
    """
    saved.check({"alpha": 1, "r": 1, "use_gating": False})
    found: dict[Site, Tensor] = {}
    for path, tensors in saved.at("loras").items():
        chosen = _chosen(program, sites, path, saved)
        if tensors.keys() != {"lora_B"}:
            raise AdapterError(f"{saved.directory}: {path} has {', '.join(tensors)}, and not one vector.")
        found.update((site, tensors["lora_B"].chunk(len(chosen))[i].flatten()) for i, site in enumerate(chosen))
    method = cast(Any, find_pass("ia3"))(at=selector_of(sites, found))
    values: dict[Key, Tensor] = {(site.id, "ia3_l"): scale for site, scale in found.items()}
    return Filled(method, values, departures(sites, saved.directory, found, ()))


def _chosen(program: ProgramData, sites: Sites, path: str, saved: Saved) -> list[Site]:
    """The sites of one weight that are adapted: of a fused one, those of the chosen q, k and v, in that order."""
    found = adapted_sites(program, sites, _weight(program, path), saved.directory)
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
    """The weight of a module by its name here: with the path, without the base's name in front, or with one."""
    own = f"{path}.weight"
    inner = own.partition(".")[2]
    ending = [name for name in program.table if name.endswith(f".{own}")]
    candidates = [name for name in (own, inner) if name in program.table]
    return candidates[0] if candidates else ending[0] if len(ending) == 1 else own
