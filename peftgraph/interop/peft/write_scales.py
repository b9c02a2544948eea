"""(IA)3 as peft spells it: one vector a module, on its output, or on its input where it is a feedforward module.

Rows that no pass scales get ones. Shapes: l (O, 1) for an output, (1, I) for an input.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftgraph.errors import AdapterError
from peftgraph.interop.peft.tensors import PREFIX
from peftgraph.interop.selecting import owners
from peftgraph.interop.written import Places, Written, modules_of, targets
from peftgraph.ir.program import ProgramData
from peftgraph.rewrite.weight_views import weight_view
from peftgraph.sites import Site, Sites


def write_scales(program: ProgramData, sites: Sites, places: Places) -> Written:
    """The configuration and tensors of (IA)3.

    Raises:
        AdapterError: peft's format has no such adapter; names the pass, the site and the reason.
    """
    by_use: dict[tuple[str, bool], dict[str, Tensor]] = {}
    for method, site, tensors in places:
        reads = site.role == "ffn.hidden" or method.side == "input"
        weight = site.weight
        if weight is None or not weight.parameter.endswith(".weight") or weight.experts or site.role == "embedding":
            raise AdapterError(f"{method} at {site}: peft's (IA)3 scales linear modules, not experts or embeddings.")
        uses = by_use.setdefault((weight.parameter, reads), {})
        op = _reader(sites, site) if site.role == "ffn.hidden" else site.op
        full = uses.setdefault(op, torch.ones(_features(program, site, reads)))
        full[_own(site, reads)] *= tensors["ia3_l"].detach().cpu()
    tensors = {}
    for (parameter, reads), uses in by_use.items():
        path, first = parameter.removesuffix(".weight"), next(iter(uses.values()))
        every = {site.op for site in owners(sites, parameter)}
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
    return Written(_options(program, list(by_use), places), tensors)


def _options(program: ProgramData, scaled: list[tuple[str, bool]], places: Places) -> dict[str, Any]:
    paths = {parameter.removesuffix(".weight"): reads for parameter, reads in scaled}
    known = modules_of(program)
    inside = [path for path, reads in paths.items() if reads]
    return {
        "peft_type": "IA3",
        "target_modules": targets(paths, known),
        "feedforward_modules": targets(inside, known) if inside else [],
        "fan_in_fan_out": all(site.weight is not None and site.weight.transposed for _, site, _ in places),
    }


def _features(program: ProgramData, site: Site, reads: bool) -> int:
    view = weight_view(site)
    assert view is not None
    matrix = type(view)(view.parameter, view.transposed).shape(program.table[view.parameter].tensor)
    return matrix[-1 if reads else -2]


def _own(site: Site, reads: bool) -> Any:
    view = weight_view(site)
    return slice(None) if reads or view is None or view.window is None else view.window.index()


def _reader(sites: Sites, hidden: Site) -> str:
    """The operator of the projection that reads a hidden value."""
    assert hidden.weight is not None
    found = owners(sites, hidden.weight.parameter)
    return next(site.op for site in found if (site.stack, site.layer) == (hidden.stack, hidden.layer))
