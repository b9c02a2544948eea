"""Reads peft's AdaLoRA: the triplets that were kept, at their places among those of the start.

    y = x W^T   ->   y = x W^T + s ((x A^T) diag(E)) B^T,  A (r, I), E (r, 1), B (O, r),  s = alpha / (init_r + 1e-5)

The file has the r triplets of a module that `rank_pattern` keeps, of init_r. Those that it lacks are zero here. Where W
is fused, each site takes the rows of B that belong to its own rows of W, and all of A and E.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftgraph.errors import AdapterError
from peftgraph.interop.parameter_names import ADALORA_E, ADALORA_P, ADALORA_Q
from peftgraph.interop.peft.config import PeftConfig
from peftgraph.interop.peft.tensors import PeftTensors
from peftgraph.interop.site_selection import output_rows, selector_for, sites_adapted_at
from peftgraph.ir.program import ProgramData
from peftgraph.passes import AdaLoRA
from peftgraph.rewrite.method import ParameterKey, PassWithValues
from peftgraph.sites import Site, Sites


def adalora_passes(
    program: ProgramData, sites: Sites, config: PeftConfig, tensors: PeftTensors
) -> list[PassWithValues]:
    """Return the pass of an AdaLoRA directory, with its values.

    Raises:
        AdapterError: a target is no site, or the tensors do not fit the rank pattern.
    """
    values: dict[ParameterKey, Tensor] = {}
    chosen: list[Site] = []
    rank = int(config.number("init_r", 12))
    for module in tensors.modules:
        path, _ = module
        config.check_selects(path)
        found = [tensors.at(module, name, config) for name in (ADALORA_Q, ADALORA_E, ADALORA_P)]
        q_RI, e_R1, p_OR = _at_their_places(path, rank, found, config)
        for site in sites_adapted_at(program, sites, f"{path}.weight", config.directory):
            chosen.append(site)
            own = {ADALORA_Q: q_RI, ADALORA_E: e_R1, ADALORA_P: p_OR[output_rows(site)]}
            values |= {(site.id, name): value for name, value in own.items()}
    if not chosen:
        return []
    return [PassWithValues(_method(config, rank, selector_for(sites, chosen)), values)]


def _method(config: PeftConfig, rank: int, at: Any) -> AdaLoRA:
    return AdaLoRA(
        at=at,
        rank=rank,
        target_rank=min(int(config.number("target_r", 8)), rank),
        alpha=float(config.number("lora_alpha", 8)),
        dropout=float(config.number("lora_dropout", 0.0)),
        warmup=int(config.number("tinit", 0)),
        final=int(config.number("tfinal", 0)),
        interval=int(config.number("deltaT", 1)),
        beta1=float(config.number("beta1", 0.85)),
        beta2=float(config.number("beta2", 0.85)),
        orthogonality=float(config.number("orth_reg_weight", 0.5)),
    )


def _at_their_places(path: str, rank: int, found: list[Tensor], config: PeftConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Return A, E and B with all triplets of the start; those that were left out are zero.

    Raises:
        AdapterError: the tensors do not fit the pattern.
    """
    a_RI, e_R1, b_OR = found[0].flatten(1), found[1], found[2]
    kept = torch.tensor(config.triplets(path))
    count = int(kept.sum())
    if (a_RI.shape[0], tuple(e_R1.shape), b_OR.shape[-1]) != (count, (count, 1), count):
        raise AdapterError(f"{config.directory}: the tensors of {path} have not the {count} triplets of its pattern.")
    all_a, all_e = a_RI.new_zeros(rank, a_RI.shape[1]), e_R1.new_zeros(rank, 1)
    all_b = b_OR.new_zeros(b_OR.shape[0], rank)
    all_a[kept], all_e[kept], all_b[:, kept] = a_RI, e_R1, b_OR
    return all_a, all_e, all_b
