"""peft's LoRA and DoRA as passes: one for each rank and scale.

    y = x W^T   ->   y = x W^T + s (x A^T) B^T,  A (R, I), B (O, R)

Where W is fused, each site that owns a part of its rows takes the same part of B, and all of A: the sum is the same. A
part of B that is all zeros is how peft's format says that a site is not adapted; it is left out, and so are the columns
of zeros in a part.
peft adapts a stack of experts by one A (E R, I) and one B (O, R E), in which the experts are the inner axis.
A rank above the smaller side of a site's own matrix is written with that side as its rank: B A = 1 (B A) or (B A) 1.
Shapes: I in, O out, R rank, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftgraph.errors import AdapterError
from peftgraph.interop.filling import Filled, Key
from peftgraph.interop.peft.config import CONFIG, PeftConfig
from peftgraph.interop.peft.stored import biases_of_b
from peftgraph.interop.peft.tensors import PeftTensors, by_expert
from peftgraph.interop.peft.tokens import TOKENS
from peftgraph.interop.selecting import adapted_sites, rows_of, selector_of
from peftgraph.ir.program import ProgramData
from peftgraph.rewrite.registry import find_pass
from peftgraph.rewrite.weight_views import weight_view
from peftgraph.sites import Site, Sites

# How a fresh adapter starts, where that leaves the base alone, or where the pass computes the start anew.
ANEW = {"pissa": "singular vectors", "olora": "orthonormal columns"}
STARTS = ("gaussian", "eva", "orthogonal", *ANEW, True, False)


# Rank, alpha, and whether the sites stand beside others of the same tied tensor that have an adapter of their own.
Group = tuple[int, float, bool]


@dataclass(frozen=True)
class Adapted:
    """One adapted weight: its name, and peft's tensors in the shapes of a plain projection, experts in front."""

    parameter: str
    rank: int
    alpha: float
    a_RI: Tensor
    b_OR: Tensor
    magnitude_O: Tensor | None


def low_rank_parts(program: ProgramData, sites: Sites, config: PeftConfig, tensors: PeftTensors) -> list[Filled]:
    """The passes of a LoRA directory, with their values.

    Raises:
        AdapterError: a target is no site, or the file says what no pass does.
    """
    if config.options.get("init_lora_weights", True) not in STARTS:
        raise _moving(config, "whose start moves the base's own weights")
    if config.options.get("init_lora_weights") in ANEW and config.of("use_dora", bool, False):
        raise _moving(config, "whose start moves the weights that its DoRA norms")
    if config.options.get("init_lora_weights") == "olora" and config.of("fan_in_fan_out", bool, False):
        raise _moving(config, "which peft takes off the transpose of what it adds to, where fan_in_fan_out=True")
    groups: dict[Group, dict[Key, Tensor]] = {}
    places: dict[Group, list[Site]] = {}
    adapted: dict[Site, Adapted] = {}
    for one in _adapted(program, config, tensors):
        found = adapted_sites(program, sites, one.parameter, config.directory)
        adapted |= dict.fromkeys([site for site in found if _moves(program, site, one)] or found, one)
    for site in (site for site in sites if site in adapted):  # the first of those that share an adapter comes first
        rank, alpha, values = _at(site, adapted[site], config)
        group: Group = (rank, alpha, False)
        leader = _turned(program, site, places.get(group, ()))
        if leader is not None and _are_transposes(groups[group], leader, values):
            places[group].append(site)  # one adapter, which the site shares
            continue
        group = (rank, alpha, leader is not None)
        groups.setdefault(group, {}).update({(site.id, leaf): value for leaf, value in values.items()})
        places.setdefault(group, []).append(site)
    parts = [_filled(sites, config, key, places[key], values) for key, values in groups.items()]
    return parts + _added_biases(program, sites, config, tensors)


def _turned(program: ProgramData, site: Site, others: Sequence[Site]) -> Site | None:
    """A site that multiplies by the transpose of the same tensor: the embedding that a head is tied to."""
    assert site.weight is not None
    tied = program.table.tied(site.weight.parameter)
    same = [one for one in others if one.weight is not None and one.weight.parameter in tied]
    return next((one for one in same if one.weight and one.weight.transposed != site.weight.transposed), None)


def _are_transposes(known: Mapping[Key, Tensor], leader: Site, values: Mapping[str, Tensor]) -> bool:
    """Whether a low-rank change is the transpose of another site's, factor by factor; DoRA's never is."""
    a, b = (known[leader.id, name] for name in ("lora_A", "lora_B"))
    plain = values.keys() == {"lora_A", "lora_B"}
    return plain and torch.equal(values["lora_A"], b.t()) and torch.equal(values["lora_B"], a.t())


def _added_biases(program: ProgramData, sites: Sites, config: PeftConfig, tensors: PeftTensors) -> list[Filled]:
    """The biases of B where the projection has none of its own."""
    values: dict[Key, Tensor] = {}
    chosen: list[Site] = []
    for name, d_O in biases_of_b(config, tensors).items():
        if name not in program.table:
            found = adapted_sites(program, sites, f"{name.removesuffix('.bias')}.weight", config.directory)
            chosen += found
            values |= {(site.id, "bitfit_d"): d_O[rows_of(site)] for site in found}
    if not chosen:
        return []
    options: dict[str, Any] = {"at": selector_of(sites, chosen), "zero": True}
    return [Filled(find_pass("bitfit")(**options), values)]


def _filled(sites: Sites, config: PeftConfig, key: Group, places: list[Site], values: dict[Key, Tensor]) -> Filled:
    dora = config.of("use_dora", bool, False)
    options: dict[str, Any] = {
        "at": selector_of(sites, places),
        "rank": key[0],
        "alpha": key[1],
        "dropout": float(config.number("lora_dropout", 0.0)),
        "rank_stabilised": config.of("use_rslora", bool, False),
    }
    if config.options.get("init_lora_weights") in ("gaussian", *ANEW) and not dora:
        options["init"] = config.options["init_lora_weights"]
    return Filled(find_pass("dora" if dora else "lora")(**options), values)


def _moving(config: PeftConfig, what: str) -> AdapterError:
    return AdapterError(
        f"{config.directory / CONFIG} has init_lora_weights={config.options['init_lora_weights']!r}, {what}. Save it "
        "with peft's path_initial_model_for_weight_conversion."
    )


def _adapted(program: ProgramData, config: PeftConfig, tensors: PeftTensors) -> Iterator[Adapted]:
    """Every adapted weight of the file, in the shapes of a plain projection."""
    for place in tensors.modules:
        path, wraps = place
        if TOKENS in tensors.modules[place]:
            continue
        parameters = config.wrapped(program.table, path)
        parameter = parameters[-1 - wraps] if wraps < len(parameters) else f"{path}.weight"
        key = parameter if parameters else path
        if not parameters and not (
            config.options.get("target_modules") in (None, "all-linear") or config.selects(path)
        ):
            raise AdapterError(f"{config.directory}: {path} has tensors, but target_modules does not select it.")
        rank = config.rank(key)
        a_RI, b_OR = tensors.of(place, "lora_A", config), tensors.of(place, "lora_B", config)
        if a_RI.dim() > 2:  # a convolution of kernel 1
            a_RI, b_OR = a_RI.flatten(1), b_OR.flatten(1)
        if parameter in program.table and program.table[parameter].tensor.dim() == 3 and parameters:
            a_RI, b_OR = by_expert(a_RI, b_OR, program.table[parameter].tensor.shape[0])
        magnitude = tensors.of(place, "dora_m", config) if config.of("use_dora", bool, False) else None
        if a_RI.shape[-2] != rank or b_OR.shape[-1] != rank:
            raise AdapterError(
                f"{config.directory}: the tensors of {path} have rank {a_RI.shape[-2]}, {CONFIG} says {rank}."
            )
        yield Adapted(parameter, rank, config.alpha(key), a_RI, b_OR, magnitude)


def _moves(program: ProgramData, site: Site, one: Adapted) -> bool:
    """Whether an adapter changes the rows that a site owns."""
    view, rows = weight_view(site), rows_of(site)
    assert view is not None
    still = not bool(one.b_OR[..., rows, :].any())
    if still and one.magnitude_O is not None:
        norm_O = torch.linalg.vector_norm(view.get(program.table[view.parameter].tensor.detach()), 2, -1)
        return not torch.allclose(one.magnitude_O[rows].to(norm_O), norm_O, rtol=1e-6, atol=0)
    return not still


def _at(site: Site, one: Adapted, config: PeftConfig) -> tuple[int, float, dict[str, Tensor]]:
    """Rank, alpha and values at one site: the rows it owns, in a rank that its own matrix has room for."""
    view = weight_view(site)
    window = None if view is None else view.window
    start = config.options.get("init_lora_weights")
    if window is not None and start in ANEW:
        raise AdapterError(
            f"{config.directory} starts from the {ANEW[start]} of all of {one.parameter}, of which {site.id} is a "
            "part. Save it with peft's path_initial_model_for_weight_conversion."
        )
    a_RI, b_OR, alpha = one.a_RI, one.b_OR[..., rows_of(site), :], one.alpha
    if b_OR.dim() == 2 and window is not None and bool(b_OR.any()):
        used = b_OR.any(0)
        a_RI, b_OR = a_RI[used], b_OR[:, used]
    out, inner, given = b_OR.shape[-2], a_RI.shape[-1], a_RI.shape[-2]
    rank = min(given, out, inner)
    if rank < given:
        product_OI, one_RR = b_OR @ a_RI, torch.eye(rank, dtype=a_RI.dtype).expand(*a_RI.shape[:-2], rank, rank)
        a_RI, b_OR = (product_OI, one_RR) if rank == out else (one_RR, product_OI)
    ratio = rank / one.rank
    alpha *= math.sqrt(ratio) if config.of("use_rslora", bool, False) else ratio
    values = {"lora_A": a_RI, "lora_B": b_OR}
    if one.magnitude_O is not None:
        values["dora_m"] = one.magnitude_O[rows_of(site)]
    return rank, alpha, values
