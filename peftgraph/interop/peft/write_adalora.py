"""Writes AdaLoRA for peft: one A, E and B for each stored weight, cut to the triplets in use.

Parts of a fused weight are written as one adapter: their triplets one after the other, with rows of zeros in B for the
features of the others. peft has one scale for all modules, so other scales are written into E.
Shapes: I in, O out, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from peftgraph.errors import AdapterError
from peftgraph.interop.parameter_names import ADALORA_E, ADALORA_P, ADALORA_Q
from peftgraph.interop.peft.adapter_content import AdaptedSite, PeftContent, module_paths, target_names
from peftgraph.interop.peft.tensors import PREFIX
from peftgraph.interop.site_selection import output_rows, sites_of_weight
from peftgraph.ir.program import ProgramData
from peftgraph.passes import AdaLoRA
from peftgraph.rewrite.weight_views import weight_view
from peftgraph.sites import Sites


@dataclass(frozen=True)
class _Triplets:
    """The adapter of one module: A (R, I), E (R, 1), B (O, R), R the number of all its triplets."""

    path: str
    a_RI: Tensor
    e_R1: Tensor
    b_OR: Tensor
    transposed: bool


def write_adalora(program: ProgramData, sites: Sites, adapted: Sequence[AdaptedSite[AdaLoRA]]) -> PeftContent:
    """Return the options and tensors of AdaLoRA.

    Raises:
        AdapterError: peft's format has no such adapter; names the pass, the site and the reason.
    """
    method = adapted[0].method
    others = [one.method for one in adapted if one.method.dropout != method.dropout]
    if others:
        raise AdapterError(f"{others[0]}: peft has one dropout for all, and another pass has {method.dropout}.")
    by_weight: dict[str, list[AdaptedSite[AdaLoRA]]] = {}
    for one in adapted:
        by_weight.setdefault(_parameter(one), []).append(one)
    modules = [_triplets(program, sites, name, found, method.scale) for name, found in by_weight.items()]
    rank = max(len(one.e_R1) for one in modules)
    trained = any(bool(one.e_R1.any()) for one in modules)
    pattern = {f"{one.path}.lora_E": _kept(one, rank).tolist() for one in modules} if trained else None
    config = _options(method, rank, modules) | {
        "target_modules": target_names([one.path for one in modules], module_paths(program)),
        "rank_pattern": pattern,
    }
    tensors: dict[str, Tensor] = {}
    for one in modules:
        kept = _kept(one, rank) if trained else torch.ones(rank, dtype=torch.bool)
        start = f"{PREFIX}{one.path}.lora_"
        tensors |= {f"{start}A": _padded(one.a_RI, 0, rank)[kept], f"{start}E": _padded(one.e_R1, 0, rank)[kept]}
        tensors[f"{start}B"] = _padded(one.b_OR, 1, rank)[:, kept]
    return PeftContent(config, tensors)


def _parameter(one: AdaptedSite[AdaLoRA]) -> str:
    """Return the weight of a site.

    Raises:
        AdapterError: peft's AdaLoRA adapts no such weight.
    """
    weight = one.site.weight
    assert weight is not None
    if one.site.role == "embedding" or not weight.parameter.endswith(".weight") or one.parameters[ADALORA_E].dim() > 2:
        raise AdapterError(f"{one.method} at {one.site}: peft's AdaLoRA adapts linear layers and convolutions alone.")
    return weight.parameter


def _triplets(
    program: ProgramData, sites: Sites, parameter: str, found: Sequence[AdaptedSite[AdaLoRA]], scale: float
) -> _Triplets:
    """Return the triplets of all parts of one weight, with a common scale.

    Raises:
        AdapterError: the weight is used several times, and not all uses have the adapter.
    """
    first = found[0]
    used = {site.op for site in sites_of_weight(sites, parameter)}
    if len(used) > 1:
        raise AdapterError(f"{first.site}: {parameter} is used {len(used)} times; save the passes in our own format.")
    view = weight_view(first.site)
    assert view is not None
    features = replace(view, window=None).shape(program.table[parameter].tensor)[-2]
    columns: list[Tensor] = []
    for one in found:
        p_OR = one.parameters[ADALORA_P]
        whole = p_OR.new_zeros(features, p_OR.shape[-1])
        whole[output_rows(one.site)] = p_OR
        columns.append(whole)
    e_R1 = torch.cat([one.parameters[ADALORA_E] * (one.method.scale / scale) for one in found])
    a_RI = torch.cat([one.parameters[ADALORA_Q] for one in found])
    return _Triplets(parameter.removesuffix(".weight"), a_RI, e_R1, torch.cat(columns, 1), view.transposed)


def _kept(one: _Triplets, rank: int) -> Tensor:
    """Return which of `rank` triplets are in use."""
    return _padded(one.e_R1[:, 0] != 0, 0, rank)


def _padded(value: Tensor, axis: int, size: int) -> Tensor:
    """Return a tensor with zeros behind it on an axis, up to a size."""
    shape = list(value.shape)
    shape[axis] = size - shape[axis]
    return torch.cat([value, value.new_zeros(shape)], axis)


def _options(method: AdaLoRA, rank: int, modules: Sequence[_Triplets]) -> dict[str, Any]:
    """Return the options but for the targets; of the training's length, the least that its phases need."""
    return {
        "peft_type": "ADALORA",
        "init_r": rank,
        "target_r": method.target_rank,
        "lora_alpha": method.alpha if rank == method.rank else method.scale * (rank + 1e-5),
        "lora_dropout": method.dropout,
        "tinit": method.warmup,
        "tfinal": method.final,
        "deltaT": method.interval,
        "beta1": method.beta1,
        "beta2": method.beta2,
        "orth_reg_weight": method.orthogonality,
        "total_step": method.warmup + method.final + method.interval,
        "fan_in_fan_out": all(one.transposed for one in modules),
    }
