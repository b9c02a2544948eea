"""peft's prefixes and prompts as passes. peft saves the rows themselves, whatever made them in training.

A prefix is (L, 2 N G F): layer by layer its keys, then its values. A prompt is (L, D); an encoder with a decoder
has 2 L rows, of which peft reads the first L, for the encoder.
Shapes: L length, N layers, G heads of keys and values, F features of one, D features of the embedding.
Source: huggingface/peft 0.21, peft_model.py (get_prompt, forward), tuners/adaption_prompt/layer.py.
"""

from __future__ import annotations

import warnings
from typing import Any, cast

from torch import Tensor

from peftgraph.errors import AdapterError
from peftgraph.interop.filling import Filled, Key
from peftgraph.interop.peft.config import PeftConfig
from peftgraph.interop.peft.tensors import PeftTensors
from peftgraph.interop.selecting import selector_of
from peftgraph.ir.program import ProgramData
from peftgraph.rewrite.method import find_pass
from peftgraph.sites import Site, Sites


def prefix_parts(program: ProgramData, sites: Sites, config: PeftConfig, tensors: PeftTensors) -> list[Filled]:
    """The pass of a PREFIX_TUNING directory.

    Raises:
        AdapterError: the model has other layers, or a decoder beside an encoder.
    """
    rows = _rows(config, tensors)
    cores = sites.select("attention.core")
    layers = int(config.number("num_layers", len(cores)))
    if [site.layer for site in cores] != list(range(layers)) or config.number("num_transformer_submodules", 1) != 1:
        raise AdapterError(
            f"{config.directory} is a prefix of {layers} layers of one stack; this {program.model} has "
            f"{len(cores)} attentions: {', '.join(site.id for site in cores)}. In a decoder beside an encoder peft "
            "gives both attentions of a layer one prefix, and position biases reach it; no pass does."
        )
    if rows.shape[1] % (2 * layers):
        raise AdapterError(f"{config.directory}: rows of {rows.shape[1]} are no keys and values of {layers} layers.")
    by_layer = rows.unflatten(1, (2 * layers, -1))
    values: dict[Key, Tensor] = {}
    for number, site in enumerate(cores):
        values[site.id, "prefix_k"], values[site.id, "prefix_v"] = by_layer[:, 2 * number], by_layer[:, 2 * number + 1]
    length = len(rows)
    warnings.warn(
        f"{config.directory}: peft counts the positions of tokens from the prefix's length on. Give the model "
        f"position_ids that start at {length} for the same outputs; without them tokens keep their own positions.",
        stacklevel=5,
    )
    return [Filled(find_pass("prefix")(at=selector_of(sites, cores), length=length, hidden=None), values)]  # pyright: ignore[reportCallIssue]


def prompt_parts(program: ProgramData, sites: Sites, config: PeftConfig, tensors: PeftTensors) -> list[Filled]:
    """The pass of a PROMPT_TUNING directory.

    Raises:
        AdapterError: the model embeds no tokens of that width, or more than one kind of them.
    """
    return [_at_embeddings("prompt", program, sites, config, _rows(config, tensors))]


def ptuning_parts(program: ProgramData, sites: Sites, config: PeftConfig, tensors: PeftTensors) -> list[Filled]:
    """The pass of a P_TUNING directory: the rows that its encoder made.

    Raises:
        AdapterError: as for a prompt.
    """
    return [_at_embeddings("ptuning", program, sites, config, _rows(config, tensors), encoder="none")]


def adaption_parts(program: ProgramData, sites: Sites, config: PeftConfig, tensors: PeftTensors) -> list[Filled]:
    """The pass of an ADAPTION_PROMPT directory: LLaMA-Adapter with one gate a layer.

    Raises:
        AdapterError: a target is no attention, or has a fused projection, behind whose output peft adds.
    """
    cores = {site.path: site for site in sites.select("attention.core")}
    fused = [site for site in sites.select("attention.k|attention.v") if site.columns is not None]
    values: dict[Key, Tensor] = {}
    places: list[Site] = []
    for place in tensors.modules:
        site = cores.get(place[0])
        if site is None or fused:
            raise AdapterError(
                f"{config.directory} has a prompt at {place[0]}, which is no attention with projections of its own "
                "for keys and values. In GPT-2 peft adds it behind the output projection, which no pass does."
            )
        rows = tensors.of(place, "prefix", config)
        values[site.id, "prefix"] = rows.flatten(0, -2)
        values[site.id, "gate"] = tensors.of(place, "gate", config)
        places.append(site)
    length = int(config.number("adapter_len", 10))
    method = find_pass("zero_init_prefix")(at=selector_of(sites, places), length=length, gate="layer")  # pyright: ignore[reportCallIssue]
    return [Filled(method, values)]


def _rows(config: PeftConfig, tensors: PeftTensors) -> Tensor:
    if tensors.rows is None or tensors.rows.dim() != 2:
        raise AdapterError(f"{config.directory}: its tensors hold no rows of a prompt.")
    return tensors.rows


def _at_embeddings(
    word: str, program: ProgramData, sites: Sites, config: PeftConfig, rows: Tensor, **options: Any
) -> Filled:
    """A pass that puts the rows in front of the tokens: an encoder's, where there is one."""
    length = int(config.number("num_virtual_tokens", len(rows)))
    found = [site for site in sites.select("embedding") if site.shape is not None and site.shape[0] == rows.shape[1]]
    places = [site for site in found if site.stack != "decoder" or len(found) == 1]
    if len(places) != 1:
        raise AdapterError(
            f"{config.directory} has a prompt of {rows.shape[1]} features; this {program.model} embeds tokens so at "
            f"{len(places)} places: {', '.join(map(str, places)) or 'none'}."
        )
    method = cast(Any, find_pass(word))(at=selector_of(sites, places), length=length, **options)
    return Filled(method, {(places[0].id, "prompt"): rows[:length]})
