"""LoReFT and NoReFT of the `adapters` library as passes.

R of LoReFT is stored as torch's parametrisation has it, a free matrix and a base; R itself is worked out of them, and
its rows, which are orthonormal, stand in the place of LoReFT's free matrix, where they stay as they are.
Source: adapter-hub/adapters 1.3, methods/reft.py; adapter_config.py, where subtract_projection is no field.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftgraph.errors import AdapterError
from peftgraph.interop.adapterhub.saved import TENSORS, Saved
from peftgraph.interop.filling import Filled, Key
from peftgraph.interop.selecting import selector_of
from peftgraph.rewrite.registry import find_pass
from peftgraph.sites import Site, Sites

NAMES = {"learned_source.weight": "weight", "learned_source.bias": "bias", "projection.weight": "projection"}
FREE, BASE = "projection.parametrizations.weight.original", "projection.parametrizations.weight.0.base"


def edits(sites: Sites, saved: Saved) -> Filled:
    """The pass of a ReFT configuration.

    Raises:
        AdapterError: a module is no block of this model, or last tokens are edited in an encoder and a decoder.
    """
    last = saved.option("suffix_positions", int)
    if last and len({site.stack for site in sites.select("block")}) > 1:
        raise AdapterError(
            f"{saved.directory} edits the last {last} tokens of a model with an encoder and a decoder: the library "
            "looks for those of the decoder where the encoder's are, which no pass does."
        )
    ends = [""] if saved.option("tied_weights", bool) else ["prefix_", "suffix_"]
    orthogonal = saved.option("orthogonality", bool)
    values: dict[Key, Tensor] = {}
    places: list[Site] = []
    for path, tensors in saved.at("refts").items():
        site = saved.site(sites, path, "block")
        places.append(site)
        for i, end in enumerate(ends):
            unit = {key.removeprefix(f"units.{i}."): value for key, value in tensors.items() if f"units.{i}." in key}
            if orthogonal:
                r_RD = _rows(unit, saved, path)
                unit = {key: value for key, value in unit.items() if key not in (FREE, BASE)}
                unit["projection.weight"] = r_RD
            named = saved.named(path, unit, NAMES)
            values.update({(site.id, f"{end}{leaf}"): value for leaf, value in named.items()})
    whole = orthogonal and all(_orthonormal(value) for key, value in values.items() if key[1].endswith("projection"))
    if whole:
        values = {(key[0], key[1].replace("projection", "directions")): value for key, value in values.items()}
    return Filled(_pass(saved, sites, places, values, last, whole), values, _remark(saved, orthogonal, whole))


def _remark(saved: Saved, orthogonal: bool, whole: bool) -> str:
    """What to say of an R that is not orthonormal."""
    if whole:
        return ""
    if orthogonal:
        return (
            f"{saved.directory} is a LoReFT whose R has lost its orthonormal rows (torch's parametrisation gives rows "
            "of zeros once weight decay has moved its signs). It is read as it answers, with a free R."
        )
    return (
        f"{saved.directory} is read as NoReFT, as the library itself reads it: the files do not say whether the "
        "projection is taken off, and those of a DiReFT look the same."
    )


def _orthonormal(r_RD: Tensor) -> bool:
    wide = r_RD.double()
    return torch.allclose(wide @ wide.T, torch.eye(len(wide), dtype=wide.dtype), atol=1e-3)


def _pass(saved: Saved, sites: Sites, places: list[Site], values: dict[Key, Tensor], last: int, whole: bool) -> Any:
    """LoReFT with the options of the library; one end alone has no other to be tied to."""
    first, tied = saved.option("prefix_positions", int), saved.option("tied_weights", bool)
    if not tied and not (first and last):  # the other end has parameters that nothing reads
        used = "prefix_" if first else "suffix_"
        kept = {key: value for key, value in values.items() if key[1].startswith(used)}
        values.clear()
        values.update({(key[0], key[1].removeprefix(used)): value for key, value in kept.items()})
        tied = True
    return cast(Any, find_pass("loreft"))(
        at=selector_of(sites, places),
        rank=saved.option("r", int),
        prefix=first,
        suffix=last,
        tied=tied,
        orthogonal=whole,
        activation=saved.activation() if saved.options.get("non_linearity") else None,
        dropout=float(saved.option("dropout", float, int)),
    )


def _rows(unit: Mapping[str, Tensor], saved: Saved, path: str) -> Tensor:
    """R, worked out as torch does."""
    if not {FREE, BASE} <= unit.keys():
        raise AdapterError(f"{saved.directory / TENSORS}: {path} lacks {FREE} or {BASE}.")
    free, dtype = unit[FREE], torch.promote_types(unit[FREE].dtype, torch.float32)
    with torch.random.fork_rng(devices=[]), torch.no_grad():  # initial values are overwritten
        layer = nn.Linear(free.shape[1], free.shape[0], bias=False, dtype=dtype)
        layer = nn.utils.parametrizations.orthogonal(layer)
        layer.load_state_dict({key.removeprefix("projection."): unit[key] for key in (FREE, BASE)})
        return cast(Tensor, layer.weight).to(free.dtype)
