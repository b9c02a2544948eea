"""Reads peft's LoRA and DoRA as passes: one for each rank and scale.

    y = x W^T   ->   y = x W^T + s (x A^T) B^T,  A (R, I), B (O, R)

Where W is fused, each site takes the rows of B that belong to its own rows of W, and all of A: the sum is the same. A
site whose rows of B are all zeros is not adapted, and is left out; so are columns of zeros in a part of B.
peft adapts a stack of experts by one A (E R, I) and one B (O, R E), in which the experts are the inner axis.
A rank above the smaller side of a site's matrix is reduced to that side: B A = 1 (B A) or (B A) 1.
Shapes: I in, O out, R rank, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from peftgraph.errors import AdapterError
from peftgraph.interop.parameter_names import BIAS_SHIFT, DORA_MAGNITUDE, LORA_A, LORA_B, TOKEN_ROWS
from peftgraph.interop.peft.config import CONFIG, PeftConfig
from peftgraph.interop.peft.read_base_parameters import biases_of_b
from peftgraph.interop.peft.tensors import PeftTensors, by_expert
from peftgraph.interop.site_selection import output_rows, selector_for, sites_adapted_at
from peftgraph.ir.program import ProgramData
from peftgraph.passes import BitFit, DoRA, LoRA
from peftgraph.rewrite.method import ParameterKey, PassWithValues
from peftgraph.rewrite.weight_views import weight_view
from peftgraph.sites import Site, Sites

# How a fresh adapter starts: where that leaves the base alone, or where the pass recomputes the start.
RECOMPUTED = {"pissa": "singular vectors", "olora": "orthonormal columns"}
STARTS = ("gaussian", "eva", "orthogonal", *RECOMPUTED, True, False)
Start = Literal["kaiming", "gaussian", "pissa", "olora"]

# Rank, alpha, and whether other sites of the same tied tensor have an adapter of their own.
Group = tuple[int, float, bool]


@dataclass(frozen=True)
class Adapted:
    """One adapted weight: its name, and peft's tensors in the shapes of a plain projection, with experts as axis 0."""

    parameter: str
    rank: int
    alpha: float
    a_RI: Tensor
    b_OR: Tensor
    magnitude_O: Tensor | None


def low_rank_passes(
    program: ProgramData, sites: Sites, config: PeftConfig, tensors: PeftTensors
) -> list[PassWithValues]:
    """Return the passes of a LoRA directory, with their values.

    Raises:
        AdapterError: a target is no site, or the file says what no pass does.
    """
    _check_start(config)
    groups: dict[Group, dict[ParameterKey, Tensor]] = {}
    members: dict[Group, list[Site]] = {}
    adapted: dict[Site, Adapted] = {}
    for one in _adapted(program, config, tensors):
        found = sites_adapted_at(program, sites, one.parameter, config.directory)
        adapted |= dict.fromkeys([site for site in found if _changes_rows(program, site, one)] or found, one)
    for site in (site for site in sites if site in adapted):  # the first of those that share an adapter comes first
        rank, alpha, values = _at_site(site, adapted[site], config)
        group: Group = (rank, alpha, False)
        leader = _transposed_twin(program, site, members.get(group, ()))
        if leader is not None and _are_transposes(groups[group], leader, values):
            members[group].append(site)  # one adapter, which the site shares
            continue
        group = (rank, alpha, leader is not None)
        groups.setdefault(group, {}).update({(site.id, leaf): value for leaf, value in values.items()})
        members.setdefault(group, []).append(site)
    passes = [_pass(sites, config, key, members[key], values) for key, values in groups.items()]
    return passes + _added_biases(program, sites, config, tensors)


def _check_start(config: PeftConfig) -> None:
    """Check that the adapter's initialisation left the base's weights unchanged, or can be recomputed.

    Raises:
        AdapterError: it does not.
    """
    start = config.options.get("init_lora_weights", True)
    if start not in STARTS:
        raise _changes_base(config, "whose start moves the base's own weights")
    if start in RECOMPUTED and config.option("use_dora", bool, False):
        raise _changes_base(config, "whose start moves the weights that its DoRA norms")
    if start == "olora" and config.option("fan_in_fan_out", bool, False):
        raise _changes_base(config, "which peft takes off the transpose of what it adds to, where fan_in_fan_out=True")


def _transposed_twin(program: ProgramData, site: Site, others: Sequence[Site]) -> Site | None:
    """Return a site that multiplies by the transpose of the same tensor: the embedding of a tied head."""
    assert site.weight is not None
    tied = program.table.tied(site.weight.parameter)
    same = [one for one in others if one.weight is not None and one.weight.parameter in tied]
    return next((one for one in same if one.weight and one.weight.transposed != site.weight.transposed), None)


def _are_transposes(known: Mapping[ParameterKey, Tensor], leader: Site, values: Mapping[str, Tensor]) -> bool:
    """Check whether a low-rank change is the transpose of another site's, factor by factor; DoRA's never is."""
    a, b = (known[leader.id, name] for name in (LORA_A, LORA_B))
    plain = values.keys() == {LORA_A, LORA_B}
    return plain and torch.equal(values[LORA_A], b.t()) and torch.equal(values[LORA_B], a.t())


def _added_biases(program: ProgramData, sites: Sites, config: PeftConfig, tensors: PeftTensors) -> list[PassWithValues]:
    """Return a pass that adds the biases of B where the projection has none of its own."""
    values: dict[ParameterKey, Tensor] = {}
    chosen: list[Site] = []
    for name, d_O in biases_of_b(config, tensors).items():
        if name not in program.table:
            found = sites_adapted_at(program, sites, f"{name.removesuffix('.bias')}.weight", config.directory)
            chosen += found
            values |= {(site.id, BIAS_SHIFT): d_O[output_rows(site)] for site in found}
    if not chosen:
        return []
    return [PassWithValues(BitFit(at=selector_for(sites, chosen), zero=True), values)]


def _pass(
    sites: Sites, config: PeftConfig, group: Group, members: list[Site], values: dict[ParameterKey, Tensor]
) -> PassWithValues:
    at, dropout = selector_for(sites, members), float(config.number("lora_dropout", 0.0))
    rank, alpha, stabilised = group[0], group[1], config.option("use_rslora", bool, False)
    if config.option("use_dora", bool, False):
        method = DoRA(at=at, rank=rank, alpha=alpha, dropout=dropout, rank_stabilised=stabilised)
        return PassWithValues(method, values)
    start = config.options.get("init_lora_weights")
    init = cast(Start, start if start in ("gaussian", *RECOMPUTED) else "kaiming")
    method = LoRA(at=at, rank=rank, alpha=alpha, dropout=dropout, rank_stabilised=stabilised, init=init)
    return PassWithValues(method, values)


def _changes_base(config: PeftConfig, what: str) -> AdapterError:
    return AdapterError(
        f"{config.directory / CONFIG} has init_lora_weights={config.options['init_lora_weights']!r}, {what}. Save it "
        "with peft's path_initial_model_for_weight_conversion."
    )


def _adapted(program: ProgramData, config: PeftConfig, tensors: PeftTensors) -> Iterator[Adapted]:
    """Yield every adapted weight of the file, in the shapes of a plain projection."""
    for module in tensors.modules:
        path, wraps = module
        if TOKEN_ROWS in tensors.modules[module]:
            continue
        parameters = config.target_parameters(program.table, path)
        parameter = parameters[-1 - wraps] if wraps < len(parameters) else f"{path}.weight"
        key = parameter if parameters else path
        if not parameters and not (
            config.options.get("target_modules") in (None, "all-linear") or config.selects(path)
        ):
            raise AdapterError(f"{config.directory}: {path} has tensors, but target_modules does not select it.")
        rank = config.rank(key)
        a_RI, b_OR = tensors.at(module, LORA_A, config), tensors.at(module, LORA_B, config)
        if a_RI.dim() > 2:  # a convolution of kernel 1
            a_RI, b_OR = a_RI.flatten(1), b_OR.flatten(1)
        if parameter in program.table and program.table[parameter].tensor.dim() == 3 and parameters:
            a_RI, b_OR = by_expert(a_RI, b_OR, program.table[parameter].tensor.shape[0])
        magnitude = tensors.at(module, DORA_MAGNITUDE, config) if config.option("use_dora", bool, False) else None
        if a_RI.shape[-2] != rank or b_OR.shape[-1] != rank:
            raise AdapterError(
                f"{config.directory}: the tensors of {path} have rank {a_RI.shape[-2]}, {CONFIG} says {rank}."
            )
        yield Adapted(parameter, rank, config.alpha(key), a_RI, b_OR, magnitude)


def _changes_rows(program: ProgramData, site: Site, one: Adapted) -> bool:
    """Check whether an adapter changes the rows that a site owns."""
    view, rows = weight_view(site), output_rows(site)
    assert view is not None
    still = not bool(one.b_OR[..., rows, :].any())
    if still and one.magnitude_O is not None:
        norm_O = torch.linalg.vector_norm(view.get(program.table.value(view.parameter).detach()), 2, -1)
        return not torch.allclose(one.magnitude_O[rows].to(norm_O), norm_O, rtol=1e-6, atol=0)
    return not still


def _at_site(site: Site, one: Adapted, config: PeftConfig) -> tuple[int, float, dict[str, Tensor]]:
    """Return rank, alpha and values at one site: its own rows, with a rank of at most its matrix's smaller side."""
    view = weight_view(site)
    window = None if view is None else view.window
    start = config.options.get("init_lora_weights")
    if window is not None and start in RECOMPUTED:
        raise AdapterError(
            f"{config.directory} starts from the {RECOMPUTED[start]} of all of {one.parameter}, of which {site.id} is "
            "a part. Save it with peft's path_initial_model_for_weight_conversion."
        )
    a_RI, b_OR, alpha = one.a_RI, one.b_OR[..., output_rows(site), :], one.alpha
    if b_OR.dim() == 2 and window is not None and bool(b_OR.any()):
        used = b_OR.any(0)
        a_RI, b_OR = a_RI[used], b_OR[:, used]
    out, inner, stored_rank = b_OR.shape[-2], a_RI.shape[-1], a_RI.shape[-2]
    rank = min(stored_rank, out, inner)
    if rank < stored_rank:
        product_OI, one_RR = b_OR @ a_RI, torch.eye(rank, dtype=a_RI.dtype).expand(*a_RI.shape[:-2], rank, rank)
        a_RI, b_OR = (product_OI, one_RR) if rank == out else (one_RR, product_OI)
    ratio = rank / one.rank
    alpha *= math.sqrt(ratio) if config.option("use_rslora", bool, False) else ratio
    values = {LORA_A: a_RI, LORA_B: b_OR}
    if one.magnitude_O is not None:
        values[DORA_MAGNITUDE] = one.magnitude_O[output_rows(site)]
    return rank, alpha, values
