"""What a peft directory holds of the base itself: modules_to_save and trained biases, as parameters that train.

peft saves the weights of embedding and head as well where the embedding is adapted or the vocabulary was resized; where
they are the base's, there is nothing to train. A bias of B is a change of the projection's own:

    W x + b + s (B A x + d)  =  W x + s B A x + (b + s d)
"""

from __future__ import annotations

import torch

from peftgraph.errors import AdapterError
from peftgraph.interop.filling import Filled, Key
from peftgraph.interop.peft.config import PeftConfig
from peftgraph.interop.peft.tensors import PeftTensors
from peftgraph.interop.selecting import selector_of
from peftgraph.interop.stored import holders, parameters_of, same
from peftgraph.ir.modes import written_buffers
from peftgraph.ir.program import ProgramData
from peftgraph.rewrite.registry import find_pass
from peftgraph.sites import Site, Sites


def stored_parts(program: ProgramData, sites: Sites, config: PeftConfig, tensors: PeftTensors) -> list[Filled]:
    """One pass that trains the base's own parameters that the file holds; none where it holds none.

    Raises:
        AdapterError: a tensor is no site's, or is tied to one that the file does not hold.
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
        beside = name in adapted or (name.endswith(".weight") and not config.saves(name.removesuffix(".weight")))
        if not (beside and same(own, value)):
            wanted[name] = value
    for name, d in moved.items():
        start = wanted.get(name, program.table[name].tensor.detach())
        wanted[name] = start.to(torch.promote_types(start.dtype, d.dtype)) + d.to(start.device)
    state = written_buffers(program.graph)
    buffers = {name: wanted.pop(name) for name in list(wanted) if name in state}
    chosen = holders(sites, set(wanted))
    _check(program, config, wanted, chosen)
    if not chosen:
        return []
    held = {name for site in chosen for name in parameters_of(site)}
    values: dict[Key, torch.Tensor] = {name: value for name, value in wanted.items() if name in held}
    values.update(buffers)
    return [Filled(find_pass("freeze")(at=selector_of(sites, chosen)), values)]  # pyright: ignore[reportCallIssue]


def biases_of_b(config: PeftConfig, tensors: PeftTensors) -> dict[str, torch.Tensor]:
    """What the biases of B (lora_bias) add to the bias of each projection, s d, by that bias's name."""
    return {
        f"{path}.bias": config.scale(path) * values["lora_bias"]
        for (path, _), values in tensors.modules.items()
        if "lora_bias" in values
    }


def _check(program: ProgramData, config: PeftConfig, wanted: dict[str, torch.Tensor], chosen: list[Site]) -> None:
    held = {name for site in chosen for name in parameters_of(site)}
    for name, value in wanted.items():
        if name not in held and not same(program.table[name].tensor, value):
            raise AdapterError(
                f"{config.directory} holds other values of {name}, which is no site's own, so that no pass trains it."
            )
        for other in program.table.tied(name):
            if name in held and not (other in wanted and torch.equal(wanted[other], value)):
                raise AdapterError(
                    f"{config.directory} trains {name}, which is tied to {other} here, and peft cuts that tie. Trace a "
                    "model whose configuration has tie_word_embeddings=False."
                )
