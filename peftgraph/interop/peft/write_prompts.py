"""Writes prefixes, prompts and LLaMA-Adapters for peft: the rows themselves, whatever computed them in training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from peftgraph.errors import AdapterError, warn
from peftgraph.interop.parameter_names import ADAPTION_GATE, ADAPTION_ROWS, PREFIX_KEYS, PREFIX_VALUES, PROMPT_ROWS
from peftgraph.interop.peft.adapter_content import AdaptedSite, PeftContent
from peftgraph.interop.peft.read_prompts import decoder_cores, have_biases, position_advice, source_layer
from peftgraph.interop.peft.tensors import PREFIX, ROWS
from peftgraph.ir.program import ProgramData
from peftgraph.passes import Prefix, Prompt, PTuning, ZeroInitPrefix
from peftgraph.rewrite.method import Pass
from peftgraph.sites import Site, Sites

# The families that peft adapts by LLaMA-Adapter, and at which role: the paper's, or after the output projection.
ADAPTED = {"Llama": "attention.core", "Mistral": "attention.core", "GPT2": "attention"}


def write_prefix(program: ProgramData, sites: Sites, adapted: Sequence[AdaptedSite[Prefix]]) -> PeftContent:
    """Return the options and rows of a prefix of every layer of one stack, (L, 2 N G F).

    Raises:
        AdapterError: peft's format has no such prefix.
    """
    method, first = adapted[0].method, adapted[0].site
    with_encoder = any(one.site.stack == "decoder" for one in adapted)
    cores = decoder_cores(sites) if with_encoder else list(sites.select("attention.core"))
    _check_every_layer(adapted, cores, with_encoder)
    biased = have_biases(program, cores)
    if biased and not method.placed:
        raise _refused(method, first, "biases of the distance fall on its prefix, as with placed=true")
    positions = None if biased else position_advice(program, method.length, with_encoder, method)
    # The rows layer by layer: keys, then values.
    found: Mapping[str, Mapping[str, Tensor]] = {one.site.id: one.parameters for one in adapted}
    by_layer = [[found[site.id][name] for name in (PREFIX_KEYS, PREFIX_VALUES)] for site in cores]
    by_layer = _arrange_for_decoder(method, cores, by_layer) if with_encoder else by_layer
    rows = [row for layer in by_layer for row in layer]
    if len({row.shape for row in rows}) > 1:
        raise _refused(method, first, "its keys and values have the same width in every layer")
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
        "num_transformer_submodules": 2 if with_encoder else 1,
    }
    return PeftContent(options, {ROWS: torch.cat(rows, 1)})


def _check_every_layer(adapted: Sequence[AdaptedSite[Prefix]], cores: list[Site], with_encoder: bool) -> None:
    """Check that every attention of one stack has one prefix.

    Raises:
        AdapterError: one has none, or several.
    """
    one_stack = [site.layer for site in cores] == list(range(len(cores)))
    if sorted(one.site.id for one in adapted) != sorted(site.id for site in cores) or not one_stack:
        where = "self-attention of the decoder" if with_encoder else "attention of one stack of layers"
        raise _refused(adapted[0].method, adapted[0].site, f"its prefix occurs once in every {where}")


def _arrange_for_decoder(method: Prefix, cores: list[Site], by_layer: list[list[Tensor]]) -> list[list[Tensor]]:
    """Arrange the rows where peft reads those of a decoder's layers, with zeros where it reads nothing.

    Raises:
        AdapterError: two layers have different rows, and peft reads them from one place.
    """
    placed = [[torch.zeros_like(row) for row in layer] for layer in by_layer]
    owners: dict[int, int] = {}
    for layer, rows in enumerate(by_layer):
        first = owners.setdefault(source_layer(layer, len(by_layer)), layer)
        if any(not torch.equal(mine, other) for mine, other in zip(rows, by_layer[first], strict=True)):
            raise _refused(
                method, cores[layer], f"it gives layers {first} and {layer} of the decoder one prefix, and these differ"
            )
        placed[source_layer(layer, len(by_layer))] = rows
    return placed


def write_prompt(program: ProgramData, sites: Sites, adapted: Sequence[AdaptedSite[Prompt | PTuning]]) -> PeftContent:
    """Return the options and rows of a prompt, (L, D).

    Raises:
        AdapterError: peft's format has no such prompt.
    """
    method, site = adapted[0].method, adapted[0].site
    if len(adapted) > 1 or (site.stack == "decoder" and len(sites.select("embedding")) > 1):
        raise _refused(method, adapted[-1].site, "its prompt is at one embedding, an encoder's where there is one")
    elsewhere = method.place != "front" if isinstance(method, Prompt) else method.token is not None
    if elsewhere:
        raise _refused(method, site, "its rows precede all tokens")
    rows = adapted[0].parameters[PROMPT_ROWS]
    options = {
        "peft_type": "PROMPT_TUNING",
        "num_virtual_tokens": method.length,
        "num_layers": sites.layers,
        "num_attention_heads": _heads(sites, "attention.q"),
        "token_dim": rows.shape[1],
        "num_transformer_submodules": 1,
    }
    return PeftContent(options, {ROWS: rows})


def write_adaption(program: ProgramData, sites: Sites, adapted: Sequence[AdaptedSite[ZeroInitPrefix]]) -> PeftContent:
    """Return the options and rows of a LLaMA-Adapter in the upper layers; a tanh of a gate is written as its value.

    Raises:
        AdapterError: peft's format has no such rows.
    """
    method, first = adapted[0].method, adapted[0].site
    role = next((role for family, role in ADAPTED.items() if program.model.startswith(family)), None)
    if role is None or method.gate != "layer":
        raise _refused(method, first, f"it has one gate a layer, in {', '.join(ADAPTED)} models")
    if any(one.site.role != role for one in adapted):
        raise _refused(method, first, f"in {program.model} peft's is at {role}")
    if {site.id for site in list(sites.select(role))[-len(adapted) :]} != {one.site.id for one in adapted}:
        raise _refused(method, first, "it occurs once in each of the uppermost layers")
    tensors: dict[str, Tensor] = {}
    for one in adapted:
        path, gate = f"{PREFIX}{one.site.path}", one.parameters[ADAPTION_GATE]
        tensors[f"{path}.adaption_prompt"] = one.parameters[ADAPTION_ROWS].unsqueeze(0)
        tensors[f"{path}.adaption_gate"] = torch.tanh(gate) if method.tanh else gate
    options = {
        "peft_type": "ADAPTION_PROMPT",
        "adapter_len": method.length,
        "adapter_layers": len(adapted),
        "target_modules": first.path.rpartition(".")[2],
    }
    return PeftContent(options, tensors)


def _heads(sites: Sites, role: str) -> int:
    """Return the number of heads of queries or keys; rows of a prompt do not depend on it."""
    return next((site.heads for site in sites.select(role) if site.heads), 1)


def _refused(method: Pass, site: Site, reason: str) -> AdapterError:
    return AdapterError(f"{method} at {site} cannot be written for peft: {reason}.")
