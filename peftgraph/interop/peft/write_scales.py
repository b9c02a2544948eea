"""Writes (IA)3 for peft: one vector for each module, on its output, or on its input (`feedforward_modules`).

Rows that no pass scales get ones. Shapes: l (O, 1) for an output, (1, I) for an input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peftgraph.errors import AdapterError
from peftgraph.interop.parameter_names import IA3_SCALE
from peftgraph.interop.peft.adapter_content import AdaptedSite, PeftContent, module_paths, target_names
from peftgraph.interop.peft.tensors import PREFIX
from peftgraph.interop.site_selection import sites_of_weight
from peftgraph.ir.program import ProgramData
from peftgraph.passes import IA3
from peftgraph.rewrite.weight_views import weight_view
from peftgraph.sites import Site, Sites


def write_scales(program: ProgramData, sites: Sites, adapted: Sequence[AdaptedSite[IA3]]) -> PeftContent:
    """Return the options and tensors of (IA)3.

    Raises:
        AdapterError: peft's format has no such adapter; the message names the pass, the site and the reason.
    """
    by_use: dict[tuple[str, bool], dict[str, Tensor]] = {}
    for one in adapted:
        method, site = one.method, one.site
        reads = site.role == "ffn.hidden" or method.side == "input"
        weight = site.weight
        if weight is None or not weight.parameter.endswith(".weight") or weight.experts or site.role == "embedding":
            raise AdapterError(f"{method} at {site}: peft's (IA)3 scales linear modules, not experts or embeddings.")
        uses = by_use.setdefault((weight.parameter, reads), {})
        op = _reader(sites, site) if site.role == "ffn.hidden" else site.op
        full = uses.setdefault(op, torch.ones(_features(program, site, reads)))
        full[_own_features(site, reads)] *= one.parameters[IA3_SCALE].detach().cpu()
    tensors = {}
    for (parameter, reads), uses in by_use.items():
        path, (first, *_) = parameter.removesuffix(".weight"), uses.values()
        every = {site.op for site in sites_of_weight(sites, parameter)}
        if (
            (parameter, not reads) in by_use
            or uses.keys() != every
            or any(not first.equal(one) for one in uses.values())
        ):
            raise AdapterError(
                f"ia3 at {path}: peft scales a module's output or its input, not both, and all its {len(every)} uses "
                "alike."
            )
        tensors[f"{PREFIX}{path}.ia3_l"] = first.unsqueeze(0 if reads else 1)
    return PeftContent(_options(program, list(by_use), adapted), tensors)


def _options(
    program: ProgramData, scaled: list[tuple[str, bool]], adapted: Sequence[AdaptedSite[IA3]]
) -> dict[str, Any]:
    paths = {parameter.removesuffix(".weight"): reads for parameter, reads in scaled}
    known = module_paths(program)
    inside = [path for path, reads in paths.items() if reads]
    return {
        "peft_type": "IA3",
        "target_modules": target_names(paths, known),
        "feedforward_modules": target_names(inside, known) if inside else [],
        "fan_in_fan_out": all(one.site.weight is not None and one.site.weight.transposed for one in adapted),
    }


def _features(program: ProgramData, site: Site, reads: bool) -> int:
    view = weight_view(site)
    assert view is not None
    matrix = type(view)(view.parameter, view.transposed).shape(program.table[view.parameter].tensor)
    return matrix[-1 if reads else -2]


def _own_features(site: Site, reads: bool) -> Any:
    view = weight_view(site)
    return slice(None) if reads or view is None or view.window is None else view.window.index()


def _reader(sites: Sites, hidden: Site) -> str:
    """Return the operator of the projection that reads a hidden value.

    Raises:
        AdapterError: no projection of its layer does.
    """
    assert hidden.weight is not None
    found = sites_of_weight(sites, hidden.weight.parameter)
    readers = [site.op for site in found if (site.stack, site.layer) == (hidden.stack, hidden.layer)]
    if not readers:
        raise AdapterError(f"ia3 at {hidden}: no projection of its layer reads it, and peft scales what one reads.")
    return readers[0]
