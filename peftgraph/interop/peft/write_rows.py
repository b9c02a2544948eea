"""Prefixes, prompts and LLaMA-Adapters as peft spells them: the rows themselves, whatever made them in training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftgraph.errors import AdapterError, warn
from peftgraph.interop.peft.rows import decoder_cores, have_biases, same_positions, served
from peftgraph.interop.peft.tensors import PREFIX, ROWS
from peftgraph.interop.written import Places, Written
from peftgraph.ir.program import ProgramData
from peftgraph.sites import Site, Sites

# The families that peft puts LLaMA-Adapter into, and the role it stands at: that of the paper, or behind the output.
ADAPTED = {"Llama": "attention.core", "Mistral": "attention.core", "GPT2": "attention"}


def write_prefix(program: ProgramData, sites: Sites, places: Places) -> Written:
    """A prefix of every layer of one stack, (L, 2 N G F).

    Raises:
        AdapterError: peft's format has no such prefix.
    """
    method, beside = places[0][0], any(site.stack == "decoder" for _, site, _ in places)
    cores = decoder_cores(sites) if beside else list(sites.select("attention.core"))
    found = {site.id: tensors for _, site, tensors in places}
    one_stack = [site.layer for site in cores] == list(range(len(cores)))
    if len(places) != len(cores) or found.keys() != {site.id for site in cores} or not one_stack:
        where = "self-attention of the decoder" if beside else "attention of one stack of layers"
        raise _refused(method, places[0][1], f"its prefix stands once in every {where}")
    biased = have_biases(program, cores)
    if biased and not method.placed:
        raise _refused(method, places[0][1], "biases of the distance fall on its prefix, as with placed=true")
    positions = None if biased else same_positions(program, method.length, beside, method)
    by_layer = [[found[site.id][name] for name in ("prefix_k", "prefix_v")] for site in cores]
    by_layer = _for_two(method, cores, by_layer) if beside else by_layer
    rows = [row for layer in by_layer for row in layer]
    if len({row.shape for row in rows}) > 1:
        raise _refused(method, places[0][1], "its keys and values have the same width in every layer")
    if positions is not None:
        warn(
            "peft counts the positions of tokens from the prefix's length on. "
            f"{positions} for the answers that peft gives.",
        )
    options = {
        "peft_type": "PREFIX_TUNING",
        "num_virtual_tokens": method.length,
        "num_layers": len(cores),
        "num_attention_heads": _heads(sites, "attention.k"),
        "token_dim": rows[0].shape[1],
        "num_transformer_submodules": 2 if beside else 1,
    }
    return Written(options, {ROWS: torch.cat(rows, 1)})


def _for_two(method: Any, cores: list[Site], by_layer: list[list[Tensor]]) -> list[list[Tensor]]:
    """The rows in the places where peft looks for those of a decoder's layers; where it never looks, zeros.

    Raises:
        AdapterError: two layers have rows of their own, and peft looks for them in one place.
    """
    placed = [[torch.zeros_like(row) for row in layer] for layer in by_layer]
    owners: dict[int, int] = {}
    for layer, rows in enumerate(by_layer):
        first = owners.setdefault(served(layer, len(by_layer)), layer)
        if any(not torch.equal(mine, other) for mine, other in zip(rows, by_layer[first], strict=True)):
            raise _refused(
                method, cores[layer], f"it gives layers {first} and {layer} of the decoder one prefix, and these differ"
            )
        placed[served(layer, len(by_layer))] = rows
    return placed


def write_prompt(program: ProgramData, sites: Sites, places: Places) -> Written:
    """A prompt, (L, D).

    Raises:
        AdapterError: peft's format has no such prompt.
    """
    method, site, tensors = places[0]
    if len(places) > 1 or (site.stack == "decoder" and len(sites.select("embedding")) > 1):
        raise _refused(method, places[-1][1], "its prompt stands at one embedding, an encoder's where there is one")
    if getattr(method, "place", "front") != "front" or getattr(method, "token", None) is not None:
        raise _refused(method, site, "its rows stand in front of all tokens")
    rows = tensors["prompt"]
    options = {
        "peft_type": "PROMPT_TUNING",
        "num_virtual_tokens": method.length,
        "num_layers": sites.layers,
        "num_attention_heads": _heads(sites, "attention.q"),
        "token_dim": rows.shape[1],
        "num_transformer_submodules": 1,
    }
    return Written(options, {ROWS: rows})


def write_adaption(program: ProgramData, sites: Sites, places: Places) -> Written:
    """LLaMA-Adapter in the upper layers; a gate that is squashed is written as what it lets through.

    Raises:
        AdapterError: peft's format has no such rows.
    """
    method = places[0][0]
    role = next((role for family, role in ADAPTED.items() if program.model.startswith(family)), None)
    if role is None or method.gate != "layer":
        raise _refused(method, places[0][1], f"it has one gate a layer, in {', '.join(ADAPTED)} models")
    if any(site.role != role for _, site, _ in places):
        raise _refused(method, places[0][1], f"in {program.model} peft's stands at {role}")
    if {site.id for site in list(sites.select(role))[-len(places) :]} != {site.id for _, site, _ in places}:
        raise _refused(method, places[0][1], "it stands once in each of the uppermost layers")
    written = {}
    for _, site, tensors in places:
        gate = torch.tanh(tensors["gate"]) if method.tanh else tensors["gate"]
        written[f"{PREFIX}{site.path}.adaption_prompt"] = tensors["prefix"].unsqueeze(0)
        written[f"{PREFIX}{site.path}.adaption_gate"] = gate
    options = {
        "peft_type": "ADAPTION_PROMPT",
        "adapter_len": method.length,
        "adapter_layers": len(places),
        "target_modules": places[0][1].path.rpartition(".")[2],
    }
    return Written(options, written)


def _heads(sites: Sites, role: str) -> int:
    """How many heads of queries or keys there are; rows of a prompt are not cut by it."""
    return next((site.heads for site in sites.select(role) if site.heads), 1)


def _refused(method: Any, site: Site, reason: str) -> AdapterError:
    return AdapterError(f"{method} at {site} cannot be written for peft: {reason}.")
