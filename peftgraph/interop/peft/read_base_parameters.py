"""Reads parameters of the base itself from a peft directory: modules_to_save and trained biases.

peft also saves the weights of embedding and head where the embedding is adapted or the vocabulary was resized; where
they equal the base's, nothing trains. A bias of B is a change of the projection's own:

    W x + b + s (B A x + d)  =  W x + s B A x + (b + s d)
"""

from __future__ import annotations

import torch

from peftgraph.errors import AdapterError
from peftgraph.interop.base_parameters import equals_or_unknown, parameters_of, sites_owning_only
from peftgraph.interop.peft.config import PeftConfig
from peftgraph.interop.peft.tensors import LORA_BIAS, PeftTensors
from peftgraph.interop.site_selection import selector_for
from peftgraph.ir.modes import written_buffers
from peftgraph.ir.program import ProgramData
from peftgraph.passes import Train
from peftgraph.rewrite.method import ParameterKey, PassWithValues
from peftgraph.sites import Site, Sites


def base_parameter_passes(
    program: ProgramData, sites: Sites, config: PeftConfig, tensors: PeftTensors
) -> list[PassWithValues]:
    """Return one pass that trains the base's own parameters that the file holds; none where it holds none.

    Raises:
        AdapterError: a tensor is no site's own, or is tied to one that the file does not hold.
    """
    adapted = {f"{path}.weight" for path, _ in tensors.modules}
    moved = {name: d for name, d in biases_of_b(config, tensors).items() if name in program.table}
    wanted: dict[str, torch.Tensor] = {}
    for name, value in tensors.stored.items():
        if name not in program.table:
            raise AdapterError(f"{config.directory} holds {name}, which this {program.model} does not have.")
        own = program.table[name].tensor
        if own.shape != value.shape:
            raise AdapterError(
                f"{config.directory}: {name} has shape {tuple(value.shape)}, this {program.model} has "
                f"{tuple(own.shape)}. Where the vocabulary was resized, resize the model before it is traced."
            )
        optional = name in adapted or (
            name.endswith(".weight") and not config.trains_whole(name.removesuffix(".weight"))
        )
        if not (optional and equals_or_unknown(own, value)):
            wanted[name] = value
    for name, d in moved.items():
        start = wanted.get(name, program.table[name].tensor.detach())
        wanted[name] = start.to(torch.promote_types(start.dtype, d.dtype)) + d.to(start.device)
    state = written_buffers(program.graph)
    buffers = {name: wanted.pop(name) for name in list(wanted) if name in state}
    chosen = sites_owning_only(sites, set(wanted))
    _check(program, config, wanted, chosen)
    if not chosen:
        return []
    owned = {name for site in chosen for name in parameters_of(site)}
    values: dict[ParameterKey, torch.Tensor] = {name: value for name, value in wanted.items() if name in owned}
    values.update(buffers)
    return [PassWithValues(Train(at=selector_for(sites, chosen)), values)]


def biases_of_b(config: PeftConfig, tensors: PeftTensors) -> dict[str, torch.Tensor]:
    """Return the value s d that the biases of B (lora_bias) add to the bias of each projection, by the name of that
    bias."""
    return {
        f"{path}.bias": config.scale(path) * values[LORA_BIAS]
        for (path, _), values in tensors.modules.items()
        if LORA_BIAS in values
    }


def _check(program: ProgramData, config: PeftConfig, wanted: dict[str, torch.Tensor], chosen: list[Site]) -> None:
    """Check that sites own all tensors that differ from the base, and that no tie is broken.

    Raises:
        AdapterError: a condition does not hold.
    """
    owned = {name for site in chosen for name in parameters_of(site)}
    for name, value in wanted.items():
        if name not in owned and not equals_or_unknown(program.table[name].tensor, value):
            raise AdapterError(
                f"{config.directory} holds other values of {name}, which is no site's own, so that no pass trains it."
            )
        for other in program.table.tied(name):
            if name in owned and not (other in wanted and torch.equal(wanted[other], value)):
                raise AdapterError(
                    f"{config.directory} trains {name}, which is tied to {other} here, and peft cuts that tie. Trace a "
                    "model whose configuration has tie_word_embeddings=False."
                )
