"""Writes merged weights back into a plain instance of the original class."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from peftgraph.errors import PeftGraphError
from peftgraph.ir.program import ProgramData

M = TypeVar("M", bound=nn.Module)


def write_back(program: ProgramData, model: M) -> M:
    """Copy the program's weights into `model`, in place, and return it.

    Each tensor that differs gets new storage, so `model` may be the traced model itself: existing programs keep the
    weights that they were traced with. A tie that folding broke is broken in the model too, and in its configuration.

    Raises:
        PeftGraphError: unfolded passes would be lost, or the model does not have the program's parameters.
            The model is unchanged then.
    """
    if program.history:
        names = "; ".join(str(applied.method) for applied in program.history)
        raise PeftGraphError(f"Fold the program first: {names} would be lost in a plain model.")
    coded = next(iter(program.table.quantised), None)
    if coded is not None:
        raise PeftGraphError(
            f"{coded} is stored as codes, which a plain model does not hold. Dequantise the program first: "
            'pg.fold(program, quantised="dequantise").'
        )
    base = (program.base or program).table
    stored = {
        name: entry.tensor
        for name, entry in program.table.items()
        if entry.kind != "constant" and (entry.persistent or entry.tensor is not base[name].tensor)
    }
    slots = _slots(model)
    _check(program, stored, slots, model)
    cut = _cut_ties(stored, slots)
    for name in cut:
        _check_untie(model, name)
    for name in cut:
        _untie(model, name)
    slots = _slots(model)
    with torch.no_grad():
        for name, value in stored.items():
            if slots[name].data_ptr() != value.data_ptr():
                slots[name].data = value.detach().clone().to(slots[name].device)
    return model


def _slots(model: nn.Module) -> dict[str, Tensor]:
    buffers = dict(model.named_buffers(remove_duplicate=False))
    return {**dict(model.named_parameters(remove_duplicate=False)), **buffers}


def _check(program: ProgramData, stored: dict[str, Tensor], slots: dict[str, Tensor], model: nn.Module) -> None:
    for name, value in stored.items():
        if name not in slots:
            raise PeftGraphError(f"The model has no {name}; it is not the {program.model} that was traced.")
        slot = slots[name]
        if slot.shape != value.shape:
            have, want = tuple(slot.shape), tuple(value.shape)
            raise PeftGraphError(f"{name} has shape {have} in the model, {want} in the program.")
        if value.device.type == "meta" or slot.device.type == "meta":
            raise PeftGraphError(f"{name} is on the meta device and has no values.")
        if slot.dtype != value.dtype:
            raise PeftGraphError(
                f"{name} is {slot.dtype} in the model and {value.dtype} in the program; the weights would be "
                f"rounded again. Convert the model first: model.to({value.dtype})."
            )
    for name, _ in model.named_parameters():
        if name not in stored:
            raise PeftGraphError(f"The model has {name}, which the {program.model} that was traced has not.")
    if type(model).__name__ != program.model:
        raise PeftGraphError(f"The model is a {type(model).__name__}; a {program.model} was traced.")


def _cut_ties(stored: dict[str, Tensor], slots: dict[str, Tensor]) -> list[str]:
    """Return the names that are tied in the model and no longer tied in the program."""
    owners: dict[int, str] = {}
    cut: list[str] = []
    for name, slot in slots.items():
        if name in stored:
            first = owners.setdefault(id(slot), name)
            if stored[first] is not stored[name]:
                cut.append(name)
    return cut


def _check_untie(model: Any, name: str) -> None:
    """Refuse to untie a weight that a transformers model would tie again when it is loaded."""
    if not hasattr(model, "get_output_embeddings"):
        return
    head = model.get_output_embeddings()
    if head is None or model.get_submodule(name.rpartition(".")[0]) is not head:
        raise PeftGraphError(
            f"{name} is tied in every {type(model).__name__}, and its configuration cannot say otherwise. "
            "Fold without untie, or export the program instead."
        )


def _untie(model: nn.Module, name: str) -> None:
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    old = getattr(owner, leaf)
    setattr(owner, leaf, nn.Parameter(old.detach().clone(), requires_grad=old.requires_grad))
    config: Any = getattr(model, "config", None)
    if getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False
