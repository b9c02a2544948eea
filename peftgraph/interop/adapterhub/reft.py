"""Reads LoReFT and NoReFT of the `adapters` library as passes.

R of LoReFT is stored as torch's orthogonal parametrisation stores it: a free matrix and a base. R is computed from them
and used as LoReFT's own free matrix; its rows are orthonormal already, so orthonormalising leaves them as they are.
Source: adapter-hub/adapters 1.3, methods/reft.py; adapter_config.py, where subtract_projection is no field.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from peftgraph.errors import AdapterError
from peftgraph.interop.adapterhub.saved_adapter import TENSORS, SavedAdapter
from peftgraph.interop.site_selection import selector_for
from peftgraph.passes import LoReFT
from peftgraph.rewrite.method import ParameterKey, PassWithValues
from peftgraph.sites import Site, Sites

NAMES = {"learned_source.weight": "weight", "learned_source.bias": "bias", "projection.weight": "projection"}
FREE, BASE = "projection.parametrizations.weight.original", "projection.parametrizations.weight.0.base"


def reft_pass(sites: Sites, saved: SavedAdapter) -> PassWithValues:
    """Return the pass of a ReFT configuration.

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
    values: dict[ParameterKey, Tensor] = {}
    blocks: list[Site] = []
    for path, tensors in saved.at("refts").items():
        site = saved.site(sites, path, "block")
        blocks.append(site)
        for i, end in enumerate(ends):
            unit = {key.removeprefix(f"units.{i}."): value for key, value in tensors.items() if f"units.{i}." in key}
            if orthogonal:
                r_RD = _orthonormal_rows(unit, saved, path)
                unit = {key: value for key, value in unit.items() if key not in (FREE, BASE)}
                unit["projection.weight"] = r_RD
            named = saved.named(path, unit, NAMES)
            values.update({(site.id, f"{end}{leaf}"): value for leaf, value in named.items()})
    whole = orthogonal and all(
        _are_orthonormal(value) for key, value in values.items() if key[1].endswith("projection")
    )
    if whole:
        values = {(key[0], key[1].replace("projection", "directions")): value for key, value in values.items()}
    values, method = _pass(saved, sites, blocks, values, last, whole)
    return PassWithValues(method, values, _remark(saved, orthogonal, whole))


def _remark(saved: SavedAdapter, orthogonal: bool, whole: bool) -> str:
    """Return the warning for an R that is not orthonormal; "" for one that is."""
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


def _are_orthonormal(r_RD: Tensor) -> bool:
    wide = r_RD.double()
    return torch.allclose(wide @ wide.T, torch.eye(len(wide), dtype=wide.dtype), atol=1e-3)


def _pass(
    saved: SavedAdapter, sites: Sites, blocks: list[Site], values: dict[ParameterKey, Tensor], last: int, whole: bool
) -> tuple[dict[ParameterKey, Tensor], LoReFT]:
    """Return LoReFT with the options of the library, and its values.

    An adapter that edits only the first or only the last tokens is written as a tied one: it has one set of parameters.
    """
    first, tied = saved.option("prefix_positions", int), saved.option("tied_weights", bool)
    if not tied and not (first and last):  # the other end has parameters that nothing reads
        used = "prefix_" if first else "suffix_"
        values = {
            (key[0], key[1].removeprefix(used)): value for key, value in values.items() if key[1].startswith(used)
        }
        tied = True
    method = LoReFT(
        at=selector_for(sites, blocks),
        rank=saved.option("r", int),
        prefix=first,
        suffix=last,
        tied=tied,
        orthogonal=whole,
        activation=saved.activation() if saved.options.get("non_linearity") else None,
        dropout=float(saved.option("dropout", float, int)),
    )
    return values, method


def _orthonormal_rows(unit: Mapping[str, Tensor], saved: SavedAdapter, path: str) -> Tensor:
    """Compute R from its parametrisation, as torch does.

    Raises:
        AdapterError: the file lacks a part of it.
    """
    if not {FREE, BASE} <= unit.keys():
        raise AdapterError(f"{saved.directory / TENSORS}: {path} lacks {FREE} or {BASE}.")
    free, dtype = unit[FREE], torch.promote_types(unit[FREE].dtype, torch.float32)
    with torch.random.fork_rng(devices=[]), torch.no_grad():  # initial values are overwritten
        layer = nn.Linear(free.shape[1], free.shape[0], bias=False, dtype=dtype)
        layer = nn.utils.parametrizations.orthogonal(layer)
        layer.load_state_dict({key.removeprefix("projection."): unit[key] for key in (FREE, BASE)})
        return cast(Tensor, layer.weight).to(free.dtype)
