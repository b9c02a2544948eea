"""Reads peft's (IA)3 as passes: scaled outputs, and scaled inputs where a module is one of its feedforward_modules.

    y = x W^T   ->   l * y,  l (O, 1)          or   (l * x) W^T,  l (1, I)

A part of a fused W whose l is all ones is not scaled; it is left out.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from peftgraph.errors import AdapterError, warn
from peftgraph.interop.ia3_sites import describe_departures
from peftgraph.interop.parameter_names import IA3_SCALE
from peftgraph.interop.peft.config import PeftConfig
from peftgraph.interop.peft.tensors import PeftTensors
from peftgraph.interop.site_selection import selector_for, sites_adapted_at
from peftgraph.ir.program import ProgramData
from peftgraph.passes import IA3
from peftgraph.rewrite.method import PassWithValues
from peftgraph.rewrite.weight_views import weight_view
from peftgraph.sites import Site, Sites


def scale_passes(program: ProgramData, sites: Sites, config: PeftConfig, tensors: PeftTensors) -> list[PassWithValues]:
    """Return the passes of an IA3 directory, with their values; warn of sites that the paper does not scale.

    Raises:
        AdapterError: a target is no site.
    """
    outputs: dict[Site, Tensor] = {}
    inputs: dict[Site, Tensor] = {}
    for module in tensors.modules:
        path, parameter = module[0], f"{module[0]}.weight"
        config.check_selects(path)
        scale = tensors.at(module, IA3_SCALE, config)
        found = sites_adapted_at(program, sites, parameter, config.directory)
        hidden = [site for site in sites if site.role == "ffn.hidden" and site.weight == found[0].weight]
        if not config.matches_target("feedforward_modules", path):
            parts = {site: _own_rows(site, scale.flatten()) for site in found}
            moved = {site: part for site, part in parts.items() if bool((part != 1).any())}
            outputs.update(moved or parts)
        elif hidden:
            outputs.update((site, scale.flatten()) for site in hidden)
        elif found[0].columns is not None:
            raise AdapterError(
                f"{config.directory} scales the input of {path}, which is fused: {', '.join(s.id for s in found)} read "
                "it together, and ia3 scales the input of a whole projection."
            )
        else:
            inputs.update((site, scale.flatten()) for site in found)
    words = describe_departures(sites, config.directory, outputs, inputs)
    if words:
        warn(words)
    sides: tuple[tuple[Literal["output", "input"], dict[Site, Tensor]], ...] = (("output", outputs), ("input", inputs))
    return [
        PassWithValues(
            IA3(at=selector_for(sites, scales), side=side),
            {(site.id, IA3_SCALE): scale for site, scale in scales.items()},
        )
        for side, scales in sides
        if scales
    ]


def _own_rows(site: Site, scale: Tensor) -> Tensor:
    view = weight_view(site)
    return scale if view is None or view.window is None else scale[view.window.index()]
