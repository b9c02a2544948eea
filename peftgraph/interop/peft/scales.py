"""peft's (IA)3 as passes: scaled outputs, and scaled inputs where a module is one of its feedforward_modules.

    y = x W^T   ->   l * y,  l (O, 1)          or   (l * x) W^T,  l (1, I)

A part of a fused W whose l is all ones is not scaled; it is left out.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from torch import Tensor

from peftgraph.errors import AdapterError, warn
from peftgraph.interop.filling import Filled
from peftgraph.interop.peft.config import PeftConfig
from peftgraph.interop.peft.tensors import PeftTensors
from peftgraph.interop.selecting import adapted_sites, selector_of
from peftgraph.ir.program import ProgramData
from peftgraph.rewrite.method import Pass
from peftgraph.rewrite.registry import find_pass
from peftgraph.rewrite.weight_views import weight_view
from peftgraph.sites import Site, Sites

PAPER = ("attention.k", "attention.v", "ffn.hidden")


def scale_parts(program: ProgramData, sites: Sites, config: PeftConfig, tensors: PeftTensors) -> list[Filled]:
    """The passes of an IA3 directory, with their values; what is scaled elsewhere than in the paper is warned of.

    Raises:
        AdapterError: a target is no site.
    """
    outputs: dict[Site, Tensor] = {}
    inputs: dict[Site, Tensor] = {}
    for place in tensors.modules:
        path, parameter = place[0], f"{place[0]}.weight"
        config.check_selects(path)
        scale = tensors.of(place, "ia3_l", config)
        found = adapted_sites(program, sites, parameter, config.directory)
        hidden = [site for site in sites if site.role == "ffn.hidden" and site.weight == found[0].weight]
        if not config.names("feedforward_modules", path):
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
    words = departures(sites, config.directory, outputs, inputs)
    if words:
        warn(words)
    return [
        Filled(_pass(sites, places, side), {(site.id, "ia3_l"): scale for site, scale in places.items()})
        for side, places in (("output", outputs), ("input", inputs))
        if places
    ]


def _pass(sites: Sites, places: dict[Site, Tensor], side: str) -> Pass:
    return find_pass("ia3")(at=selector_of(sites, places), side=side)  # pyright: ignore[reportCallIssue]


def _own_rows(site: Site, scale: Tensor) -> Tensor:
    view = weight_view(site)
    return scale if view is None or view.window is None else scale[view.window.index()]


def departures(sites: Sites, directory: Path, outputs: Collection[Site], inputs: Collection[Site]) -> str:
    """What to say where an adapter departs from the paper: keys, values, and the hidden value of the feed-forward.

    The linear branch of a gated unit may be scaled for its product: act(g) (l u) = l (act(g) u).
    """
    gated = {(site.stack, site.layer) for site in sites if site.role == "ffn.gate"}
    linear = [site for site in outputs if site.role == "ffn.up" and (site.stack, site.layer) in gated]
    scaled = ["ffn.hidden" if site in linear else site.role for site in outputs]
    departs = [f"the output of {role}" for role in scaled if role not in PAPER]
    departs += [f"the input of {site.role}" for site in inputs]
    departs += [f"no {role}" for role in PAPER if role not in scaled]
    if not departs:
        return ""
    return (
        f"{directory} scales {', '.join(dict.fromkeys(departs))}: it is loaded as it was trained, but the paper's "
        f"(IA)3 scales {', '.join(PAPER)} (arXiv 2205.05638, section 3.3)."
    )
