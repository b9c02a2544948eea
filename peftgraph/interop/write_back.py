"""Merged weights into a plain instance of the original class."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from peftgraph.errors import PeftGraphError
from peftgraph.ir.program import ProgramData

M = TypeVar("M", bound=nn.Module)


def write_back(program: ProgramData, model: M) -> M:
    """Copies the program's base weights into `model`, in place, and returns it.

    A tie that folding has cut is cut in the model too, and its configuration says so.

    Raises:
        PeftGraphError: unfolded passes would be lost, or the model does not have the program's parameters. The model is
            unchanged then.
    """
    if program.history:
        names = "; ".join(str(applied.method) for applied in program.history)
        raise PeftGraphError(f"Fold the program first: {names} would be lost in a plain model.")
    slots: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    slots |= dict(model.named_buffers(remove_duplicate=False))
    stored = {name: entry.tensor for name, entry in program.table.items() if entry.kind != "constant"}
    _check(program, stored, slots)
    with torch.no_grad():
        for name in _cut_ties(stored, slots):
            _untie(model, name)
        slots = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
        for name, value in stored.items():
            slots[name].copy_(value)
    return model


def _check(program: ProgramData, stored: dict[str, Tensor], slots: dict[str, Tensor]) -> None:
    for name, value in stored.items():
        if name not in slots:
            raise PeftGraphError(f"The model has no {name}; it is not the {program.model} that was traced.")
        if slots[name].shape != value.shape:
            raise PeftGraphError(f"{name} has shape {tuple(slots[name].shape)} in the model, {tuple(value.shape)} in the program.")
        if value.device.type == "meta" or slots[name].device.type == "meta":
            raise PeftGraphError(f"{name} is on the meta device and has no values.")


def _cut_ties(stored: dict[str, Tensor], slots: dict[str, Tensor]) -> list[str]:
    """Names that share a tensor in the model and hold different ones in the program: all but the first of each."""
    owners: dict[int, str] = {}
    cut: list[str] = []
    for name, slot in slots.items():
        if name not in stored:
            continue
        first = owners.setdefault(id(slot), name)
        if first != name and stored[first] is not stored[name]:
            cut.append(name)
    return cut


def _untie(model: nn.Module, name: str) -> None:
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    old = getattr(owner, leaf)
    setattr(owner, leaf, nn.Parameter(old.detach().clone(), requires_grad=old.requires_grad))
    config = getattr(model, "config", None)
    if getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False  # pyright: ignore[reportOptionalMemberAccess]
