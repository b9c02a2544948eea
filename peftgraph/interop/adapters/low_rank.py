"""LoRA and (IA)3 of the `adapters` library as passes.

In its fused projections of GPT-2, A and B of the chosen of q, k and v lie one below the other, and so do the rows of
their gates; its (IA)3 scales what a projection gives, in the feed-forward the first, before the nonlinearity.
Source: adapter-hub/adapters 1.3, methods/lora.py.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor

from peftgraph.errors import AdapterError
from peftgraph.interop.adapters.saved import Saved
from peftgraph.interop.filling import Filled, Key
from peftgraph.interop.peft.scales import departures
from peftgraph.interop.selecting import adapted_sites, selector_of
from peftgraph.ir.program import ProgramData
from peftgraph.rewrite.method import find_pass
from peftgraph.sites import Site, Sites

NAMES = {
    "lora_A": "lora_A",
    "lora_B": "lora_B",
    "gate.weight": "lora_gate_weight",
    "gate.bias": "lora_gate_bias",
}
FORM = {"use_dora": False, "vera_b": None, "vera_d": None}


def low_rank(program: ProgramData, sites: Sites, saved: Saved) -> Filled:
    """The pass of a LoRA; a gate stands in the place of alpha / r.

    Raises:
        AdapterError: an option makes another method of it, or a module is no projection of this model.
    """
    saved.check(FORM)
    values: dict[Key, Tensor] = {}
    places: list[Site] = []
    for path, tensors in saved.at("loras").items():
        chosen = _chosen(program, sites, path, saved)
        for i, site in enumerate(chosen):
            named = saved.named(path, tensors, NAMES)
            values.update({(site.id, leaf): value.chunk(len(chosen))[i] for leaf, value in named.items()})
        places += chosen
    rank, gated = saved.option("r", int), bool(saved.options.get("use_gating"))
    method = cast(Any, find_pass("lora"))(
        at=selector_of(sites, places),
        rank=rank,
        alpha=float(rank if gated else saved.option("alpha", float, int)),
        dropout=float(saved.option("dropout", float, int)),
    )
    return Filled(method, values)


def scales(program: ProgramData, sites: Sites, saved: Saved) -> Filled:
    """The pass of an (IA)3.

    Raises:
        AdapterError: as `low_rank`.
    """
    saved.check(FORM | {"alpha": 1, "r": 1, "use_gating": False})
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
