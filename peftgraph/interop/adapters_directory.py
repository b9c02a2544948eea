"""Directories that the `adapters` library saved, as passes with their trained parameters.

Read are bottlenecks (after a sublayer, on the residual sum, beside a sublayer), LoRA and (IA)3. In the library's fused
projections of GPT-2, A and B of the chosen of q, k and v lie one below the other; its (IA)3 scales what a projection
gives, in the feed-forward the first, before the nonlinearity.
Source: adapter-hub/adapters 1.3, methods/bottleneck.py, modeling.py and lora.py; configuration/adapter_config.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast

from torch import Tensor

from peftgraph.errors import AdapterError
from peftgraph.interop.documents import read_json, read_tensors
from peftgraph.interop.filling import Filled, Key, fill, renamed
from peftgraph.interop.peft.config import CONFIG
from peftgraph.interop.peft.scales import warn_of_places
from peftgraph.interop.selecting import adapted_sites, selector_of
from peftgraph.ir.program import ProgramData
from peftgraph.rewrite.method import find_pass
from peftgraph.sites import Site, Sites

P = TypeVar("P", bound=ProgramData)
TENSORS = "adapter.safetensors"
ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "swish": "silu", "silu": "silu", "tanh": "tanh", "sigmoid": "sigmoid"}
KEY = re.compile(r"(?P<path>.+)\.(?P<kind>adapters|loras)\.[^.]+\.(?P<leaf>.+)")
LEAVES = {
    "adapter_down.0.weight": "down_weight",
    "adapter_down.0.bias": "down_bias",
    "adapter_up.weight": "up_weight",
    "adapter_up.bias": "up_bias",
    "scaling": "scale",
    "lora_A": "lora_A",
    "lora_B": "lora_B",
}
# options of a bottleneck, and of a LoRA, whose other values are other methods
BOTTLENECK = {
    "adapter_residual_before_ln": False, "cross_adapter": False, "inv_adapter": None, "ln_after": False,
    "ln_before": False, "phm_layer": False, "residual_before_ln": True, "stochastic_depth": 0.0, "use_gating": False,
}  # fmt: skip
LORA = {"use_dora": False, "use_gating": False, "vera_b": None, "vera_d": None}


@dataclass(frozen=True)
class Saved:
    """What a directory holds.

    Attributes:
        directory: where it lies, for messages.
        options: those of the library's configuration.
        tensors: by path of a module, then by our names.
    """

    directory: Path
    options: Mapping[str, Any]
    tensors: Mapping[str, Mapping[str, Tensor]]

    def refuse(self, what: str) -> AdapterError:
        """The error for what no pass does."""
        return AdapterError(f"{self.directory / CONFIG} has {what}, which is not read.")

    def check(self, needed: Mapping[str, object]) -> None:
        """Refuses options that make another method of it."""
        for key, value in needed.items():
            if self.options.get(key, value) != value:
                raise self.refuse(f"{key}={self.options[key]!r}")


def is_adapters(directory: Path) -> bool:
    """Whether a directory holds the library's files: its configuration has the model's class beside the options."""
    found = read_json(directory / CONFIG, missing=f"{directory} holds no {CONFIG}.")
    return isinstance(found, dict) and "model_class" in found and isinstance(found.get("config"), dict)


def load_adapters(program: P, sites: Sites, apply: Callable[..., P], directory: Path, name: str | None) -> P:
    """The program after the pass that a directory of the library stands for, with its parameters.

    Raises:
        AdapterError: the files are damaged, fit another base, or say what no pass does.
    """
    saved = _read(directory)
    architecture = saved.options.get("architecture")
    if architecture is None:
        parts = [_bottlenecks(sites, saved)]
    elif architecture == "lora" and saved.options.get("composition_mode") == "add":
        parts = [_low_rank(program, sites, saved)]
    elif architecture == "lora":
        parts = [_scales(program, sites, saved)]
    else:
        raise saved.refuse(f"architecture={architecture!r}")
    methods = renamed([part.method for part in parts], name, directory)
    named = [replace(part, method=method) for part, method in zip(parts, methods, strict=True)]
    return fill(program, apply, named, directory)


def _read(directory: Path) -> Saved:
    if not (directory / TENSORS).exists() and (directory / "pytorch_adapter.bin").exists():
        raise AdapterError(
            f"{directory / 'pytorch_adapter.bin'} is a pickle, which is not read. Load it with the library and save it "
            "with use_safetensors=True."
        )
    options = read_json(directory / CONFIG, missing=f"{directory} holds no {CONFIG}.")["config"]
    tensors: dict[str, dict[str, Tensor]] = {}
    for key, value in sorted(read_tensors(directory / TENSORS).items()):
        found = KEY.fullmatch(key)
        leaf = None if found is None else LEAVES.get(found["leaf"])
        if found is None or leaf is None:
            raise AdapterError(f"{directory / TENSORS} holds {key}, which belongs to no method that is read.")
        tensors.setdefault(found["path"], {})[leaf] = value
    if not tensors:
        raise AdapterError(f"{directory / TENSORS} holds no tensors.")
    return Saved(directory, options, tensors)


def _bottlenecks(sites: Sites, saved: Saved) -> Filled:
    """Adapters after a sublayer (Houlsby), on the residual sum (Pfeiffer), or beside a sublayer."""
    saved.check(BOTTLENECK)
    activation, scale = ACTIVATIONS.get(saved.options["non_linearity"]), saved.options.get("scaling", 1.0)
    if activation is None:
        raise saved.refuse(f"non_linearity={saved.options['non_linearity']!r}")
    values: dict[Key, Tensor] = {}
    places: list[Site] = []
    for path, tensors in saved.tensors.items():
        site = _sublayer(sites, path, saved)
        places.append(site)
        values.update({(site.id, leaf): value for leaf, value in tensors.items()})
    widths = {tensors["down_weight"].shape[0] for tensors in saved.tensors.values() if "down_weight" in tensors}
    if len(widths) != 1:
        raise saved.refuse(f"bottlenecks of the widths {sorted(widths)}")
    options: dict[str, Any] = {"at": selector_of(sites, places), "width": widths.pop(), "activation": activation}
    options["dropout"] = float(saved.options.get("dropout", 0.0))
    if saved.options.get("is_parallel"):
        learned = scale == "learned"
        options |= {"input": "residual", "scale": 1.0 if learned else float(scale), "learned": learned}
        return Filled(cast(Any, find_pass("parallel_adapter"))(**options), values)
    saved.check({"scaling": 1.0})
    if saved.options.get("original_ln_before"):
        return Filled(cast(Any, find_pass("pfeiffer"))(**options), values)
    return Filled(cast(Any, find_pass("houlsby"))(**options, norms=False), values)


def _sublayer(sites: Sites, path: str, saved: Saved) -> Site:
    """The sublayer that the library's place is about: its layer is the first number of the path."""
    number = re.search(r"(?<![^.])\d+(?![^.])", path)
    role = "attention" if "attention" in path else "ffn"
    layer = None if number is None else int(number[0])
    found = [site for site in sites.select(role) if site.layer == layer]
    if len(found) != 1:
        raise AdapterError(
            f"{saved.directory} has an adapter at {path}: this model has {len(found)} sites {role} in layer {layer}."
        )
    return found[0]


def _low_rank(program: ProgramData, sites: Sites, saved: Saved) -> Filled:
    saved.check(LORA)
    values: dict[Key, Tensor] = {}
    places: list[Site] = []
    for path, tensors in saved.tensors.items():
        chosen = _chosen(program, sites, path, saved)
        for i, site in enumerate(chosen):
            values.update({(site.id, leaf): value.chunk(len(chosen))[i] for leaf, value in tensors.items()})
        places += chosen
    method = cast(Any, find_pass("lora"))(
        at=selector_of(sites, places),
        rank=int(saved.options["r"]),
        alpha=float(saved.options["alpha"]),
        dropout=float(saved.options.get("dropout", 0.0)),
    )
    return Filled(method, values)


def _scales(program: ProgramData, sites: Sites, saved: Saved) -> Filled:
    saved.check(LORA | {"alpha": 1, "r": 1})
    scales: dict[Site, Tensor] = {}
    for path, tensors in saved.tensors.items():
        chosen = _chosen(program, sites, path, saved)
        if tensors.keys() != {"lora_B"}:
            raise AdapterError(f"{saved.directory}: {path} has {', '.join(tensors)}, and not one vector.")
        scales.update((site, tensors["lora_B"].chunk(len(chosen))[i].flatten()) for i, site in enumerate(chosen))
    warn_of_places(sites, saved.directory, scales, ())
    method = cast(Any, find_pass("ia3"))(at=selector_of(sites, scales))
    return Filled(method, {(site.id, "ia3_l"): scale for site, scale in scales.items()})


def _chosen(program: ProgramData, sites: Sites, path: str, saved: Saved) -> list[Site]:
    """The sites of one weight that are adapted: of a fused one, those of the chosen q, k and v, in that order."""
    found = adapted_sites(program, sites, f"{path}.weight", saved.directory)
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
