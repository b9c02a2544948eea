"""Writes LoRA and DoRA for peft: one A and one B for each stored weight.

    sum_i s_i B_i A_i, B_i on some rows of W   ->   B A,  A = [A_1; A_2; ...],  B = [s_1 B_1, s_2 B_2, ...]

peft adapts a stored weight as a whole. Rows that no pass adapts get rows of zeros in B, and DoRA's magnitudes there are
the norms of the stored rows. Low-rank paths with equal A are one path. PiSSA's frozen start is one more path, with -s.
Shapes: I in, O out, R rank, E experts as axis 0.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from peftgraph.errors import AdapterError
from peftgraph.interop.parameter_names import DORA_MAGNITUDE, LORA_A, LORA_A0, LORA_B, LORA_B0
from peftgraph.interop.peft.adapter_content import AdaptedSite, PeftContent, module_paths, target_names
from peftgraph.interop.peft.tensors import PREFIX
from peftgraph.interop.site_selection import output_rows, sites_of_weight
from peftgraph.ir.program import ProgramData
from peftgraph.passes import DoRA, LoRA
from peftgraph.rewrite.weight_views import weight_view
from peftgraph.sites import Site, Sites

Method = LoRA | DoRA


@dataclass(frozen=True)
class LowRankPath:
    """A low-rank path s B A on the rows that a site owns; `magnitude_O` for DoRA."""

    site: Site
    scale: float
    a_RI: Tensor
    b_OR: Tensor
    magnitude_O: Tensor | None = None


@dataclass(frozen=True)
class WeightAdapter:
    """The sum of all low-rank paths on one stored weight, as one path."""

    parameter: str
    site: Site
    a_RI: Tensor
    b_OR: Tensor
    scale: float
    magnitude_O: Tensor | None = field(default=None)

    @property
    def rank(self) -> int:
        """R."""
        return self.a_RI.shape[-2]

    @property
    def alpha(self) -> float:
        """The option lora_alpha; peft's scale is alpha / rank."""
        alpha = self.scale * self.rank
        return round(alpha) if abs(alpha - round(alpha)) < 1e-9 else alpha

    @property
    def module(self) -> str:
        """The module's path, or the parameter's own name where it is no module's `weight`."""
        return self.parameter.removesuffix(".weight")


def write_low_rank(program: ProgramData, sites: Sites, adapted: Sequence[AdaptedSite[Method]]) -> PeftContent:
    """Return the options and tensors of LoRA or DoRA.

    Raises:
        AdapterError: peft's format has no such adapter; the message names the pass, the site and the reason.
    """
    paths: dict[str, list[LowRankPath]] = {}
    leaders: dict[int, Site] = {}  # by the memory of A: the first site of those that share it
    for one in adapted:
        site, tensors = one.site, one.parameters
        leader = leaders.setdefault(tensors[LORA_A].data_ptr(), site)
        assert site.weight is not None
        assert leader.weight is not None
        if site.weight.transposed != leader.weight.transposed:  # a head by the transpose of its embedding: (B A)^T
            tensors = {LORA_A: tensors[LORA_B].t(), LORA_B: tensors[LORA_A].t()}
        paths.setdefault(site.weight.parameter, []).extend(_paths(one.method, site, tensors))
    weights = [_weight_adapter(program, sites, parameter, found) for parameter, found in paths.items()]
    config = _options([one.method for one in adapted], weights) | _targets(program, weights)
    return PeftContent(
        config, {key: value for one in weights for key, value in _tensors(program, weights, one).items()}
    )


def _paths(method: Method, site: Site, tensors: Mapping[str, Tensor]) -> list[LowRankPath]:
    """Return the low-rank paths of a pass at a site.

    Raises:
        AdapterError: peft has no such DoRA.
    """
    scale = method.scale * (method.weight if isinstance(method, LoRA) else 1.0)
    found = [LowRankPath(site, scale, tensors[LORA_A], tensors[LORA_B], tensors.get(DORA_MAGNITUDE))]
    if LORA_A0 in tensors:
        found.append(LowRankPath(site, -scale, tensors[LORA_A0], tensors[LORA_B0]))
    if isinstance(method, DoRA) and found[0].a_RI.dim() > 2:
        raise AdapterError(f"{method} at {site}: peft has no DoRA of experts.")
    if isinstance(method, DoRA) and method.form != "paper":
        raise AdapterError(f"{method} at {site}: peft's DoRA is the paper's, which answers otherwise.")
    return found


def _weight_adapter(program: ProgramData, sites: Sites, parameter: str, paths: Sequence[LowRankPath]) -> WeightAdapter:
    """Add up the paths on one stored weight.

    Raises:
        AdapterError: the weight is used several times, with different paths.
    """
    by_use = {
        op: [path for path in paths if path.site.op == op] for op in (s.op for s in sites_of_weight(sites, parameter))
    }
    first, *others = [_add_up(program, parameter, found) for found in by_use.values() if found]
    alike = len(others) + 1 == len(by_use) and all(
        torch.equal(one.a_RI, first.a_RI) and torch.equal(one.b_OR, first.b_OR) and one.scale == first.scale
        for one in others
    )
    if not alike:
        raise AdapterError(f"{paths[0].site}: {parameter} is used {len(by_use)} times, and peft adapts all uses alike.")
    return first


def _add_up(program: ProgramData, parameter: str, paths: Sequence[LowRankPath]) -> WeightAdapter:
    """Return one path on all rows of a weight."""
    stored, site = program.table.value(parameter), paths[0].site
    view = weight_view(site)
    assert view is not None
    matrix_OI = replace(view, window=None).get(stored.detach())
    alike: list[tuple[Tensor, float, Tensor]] = []
    for path in paths:
        same = next((b for a, s, b in alike if s == path.scale and torch.equal(a, path.a_RI)), None)
        if same is None:
            same = path.b_OR.new_zeros(*path.b_OR.shape[:-2], matrix_OI.shape[-2], path.b_OR.shape[-1])
            alike.append((path.a_RI, path.scale, same))
        same[..., output_rows(path.site), :] += path.b_OR
    magnitude = _magnitudes(matrix_OI, paths)
    scale = alike[0][1] if len({s for _, s, _ in alike}) == 1 else 1.0
    a_RI, b_OR = torch.cat([a for a, _, _ in alike], -2), torch.cat([b * (s / scale) for _, s, b in alike], -1)
    return WeightAdapter(parameter, site, a_RI, b_OR, scale, magnitude)


def _magnitudes(matrix_OI: Tensor, paths: Sequence[LowRankPath]) -> Tensor | None:
    """Return DoRA's magnitudes of all rows; None for LoRA.

    Raises:
        AdapterError: two DoRAs are on the same rows.
    """
    if paths[0].magnitude_O is None:
        return None
    magnitude_O = torch.linalg.vector_norm(matrix_OI, 2, -1)
    seen = torch.zeros_like(magnitude_O, dtype=torch.bool)
    for path in paths:
        assert path.magnitude_O is not None
        if bool(seen[output_rows(path.site)].any()):
            raise AdapterError(f"{path.site}: two DoRAs are on the same features, and peft has one.")
        seen[output_rows(path.site)] = True
        magnitude_O[output_rows(path.site)] = path.magnitude_O
    return magnitude_O


def _options(methods: Sequence[Method], weights: Sequence[WeightAdapter]) -> dict[str, Any]:
    """Return the options except the targets; the most frequent rank and alpha are the default ones.

    Raises:
        AdapterError: the passes have several rates of dropout, or one where peft has none.
    """
    dropouts = {method.dropout for method in methods}
    stacked = [one for one in weights if not one.parameter.endswith(".weight")]
    if len(dropouts) > 1 or (stacked and dropouts != {0.0}):
        where = f"at {stacked[0].site}, as bare parameters have none" if stacked else "for all"
        raise AdapterError(f"{methods[0]}: peft has one dropout {where}; these passes have {sorted(dropouts)}.")
    linear = [one.site.weight for one in weights if one.site.role != "embedding" and one not in stacked]
    (rank, alpha), _ = Counter((one.rank, one.alpha) for one in weights).most_common(1)[0]
    longest_first = sorted(weights, key=lambda one: -len(one.parameter))
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropouts.pop(),
        "use_dora": isinstance(methods[0], DoRA),
        "fan_in_fan_out": bool(linear) and all(weight is not None and weight.transposed for weight in linear),
        "rank_pattern": {re.escape(one.module): one.rank for one in longest_first if one.rank != rank},
        "alpha_pattern": {re.escape(one.module): one.alpha for one in longest_first if one.alpha != alpha},
    }


def _targets(program: ProgramData, weights: Sequence[WeightAdapter]) -> dict[str, Any]:
    modules = [one.module for one in weights if one.parameter.endswith(".weight")]
    bare = sorted(one.parameter for one in weights if not one.parameter.endswith(".weight"))
    return {"target_modules": target_names(modules, module_paths(program))} | (
        {"target_parameters": bare} if bare else {}
    )


def _tensors(program: ProgramData, weights: Sequence[WeightAdapter], one: WeightAdapter) -> dict[str, Tensor]:
    """Return the tensors of one weight by peft's names, in peft's shapes.

    Raises:
        AdapterError: peft does not adapt a weight of that shape.
    """
    stored, a_RI, b_OR = program.table[one.parameter].tensor, one.a_RI, one.b_OR
    path, word, end = one.module, "lora_", ".weight"
    if not one.parameter.endswith(".weight"):
        owner = one.parameter.rpartition(".")[0]
        together = [name for name in program.table if any(name == other.parameter for other in weights)]
        together = [name for name in together if name.rpartition(".")[0] == owner]
        path = owner + ".base_layer" * (len(together) - 1 - together.index(one.parameter))
        if a_RI.dim() == 3:
            a_RI, b_OR = a_RI.flatten(0, 1), b_OR.permute(1, 2, 0).flatten(1)
        elif one.site.weight is not None and one.site.weight.transposed:
            a_RI, b_OR = b_OR.mT, a_RI.mT
    elif one.site.role == "embedding":
        word, end = "lora_embedding_", ""
    elif stored.dim() > 2:
        if any(size != 1 for size in stored.shape[2:]):
            raise AdapterError(f"{one.site}: {one.parameter} is {tuple(stored.shape)}, and peft adapts matrices.")
        ones = [1] * (stored.dim() - 2)
        a_RI, b_OR = a_RI.unflatten(-1, (-1, *ones)), b_OR.unflatten(-1, (-1, *ones))
    found = {f"{PREFIX}{path}.{word}A{end}": a_RI, f"{PREFIX}{path}.{word}B{end}": b_OR}
    if one.magnitude_O is not None:
        found[f"{PREFIX}{path}.lora_magnitude_vector"] = one.magnitude_O
    return found
