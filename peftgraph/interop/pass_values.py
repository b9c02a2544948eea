"""Applies passes whose parameters have known values, which readers of foreign adapters return."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from peftgraph.errors import AdapterError, warn
from peftgraph.ir.program import ProgramData
from peftgraph.rewrite.method import SHARED, ParameterKey, Pass, PassWithValues

P = TypeVar("P", bound=ProgramData)


def apply_passes(apply: Callable[..., P], methods: Sequence[Pass], directory: Path) -> P:
    """Apply passes whose initial values will be overwritten; the user's random generator keeps its state.

    Raises:
        AdapterError: a width or rank is absurdly large.
    """
    try:
        with torch.random.fork_rng(devices=[]):
            return apply(*methods)
    except (RuntimeError, MemoryError, OverflowError) as error:
        raise AdapterError(f"{directory}: its recipe cannot be applied: {error}") from None


def rename_passes(methods: Sequence[Pass], name: str | None, directory: Path) -> list[Pass]:
    """Return the passes under another name; unchanged if `name` is None.

    Raises:
        AdapterError: two passes of one kind would have the same name.
    """
    if name is None:
        return list(methods)
    words = [method.word for method in methods]
    twice = next((word for word in words if words.count(word) > 1), None)
    if twice is not None:
        raise AdapterError(f"{directory} holds more than one {twice}; one name cannot stand for both.")
    return [method.renamed(name) for method in methods]


def check_fit(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], directory: Path) -> None:
    """Check that tensors have, one for one, the names, the shapes and the kind of dtype that are wanted.

    Raises:
        AdapterError: one does not fit; the message names the first.
    """
    for key in sorted(tensors.keys() ^ wanted.keys()):
        where = "is not in the file" if key in wanted else "belongs to no parameter of the recipe"
        raise AdapterError(f"{directory}: {key} {where}.")
    for key, value in tensors.items():
        have, made = tuple(value.shape), tuple(wanted[key].shape)
        if have != made:
            raise AdapterError(f"{directory}: {key} has shape {have}, the recipe makes {made}.")
        if value.is_floating_point() != wanted[key].is_floating_point():
            raise AdapterError(
                f"{directory}: {key} holds {value.dtype}, which cannot train as {wanted[key].dtype} does."
            )


def load_passes(
    program: P, apply: Callable[..., P], parts: Sequence[PassWithValues], directory: Path, name: str | None
) -> P:
    """Apply passes with values, under another name if one is given, and warn of their remarks.

    Args:
        program: what the passes are applied to.
        apply: its method that applies passes.
        parts: the passes.
        directory: where they were read, for messages.
        name: for the passes, instead of their own.

    Raises:
        AdapterError: there is no pass, a value fits no parameter, or a parameter has no value.
    """
    if not parts:
        raise AdapterError(f"{directory} contains no tensors.")
    for part in parts:
        if part.remark:
            warn(part.remark)
    methods = rename_passes([part.method for part in parts], name, directory)
    return apply_with_values(
        program, apply, [replace(part, method=one) for part, one in zip(parts, methods, strict=True)], directory
    )


def apply_with_values(program: P, apply: Callable[..., P], parts: Sequence[PassWithValues], directory: Path) -> P:
    """Apply passes and give their parameters the known values.

    Raises:
        AdapterError: a value fits no parameter, or a parameter has no value.
    """
    tuned = apply_passes(apply, [part.method for part in parts], directory)
    values = {key: value for part in parts for key, value in part.values.items()}
    tensors: dict[str, Tensor] = {}
    for edit in tuned.edits:
        if edit.application < len(program.history):
            continue
        for name in edit.parameters:
            leaf = name.rpartition(".")[2]
            own = dict(edit.installed)
            replaced = [stored for stored in own if own[stored] == name]  # by a named adapter's own copy
            added = tuned.table[name].added and not replaced
            keys: list[ParameterKey] = [(edit.site, leaf), (SHARED, leaf)] if added else [*replaced, name]
            found = next((key for key in keys if key in values), None)
            if found is not None:
                value = values.pop(found)
                tensors.setdefault(name, value)  # uses of one weight share their parameters
    tensors |= {name: values.pop(name) for name in tuned.table.state if name in values}
    unused = next(iter(values), None)
    if unused is not None:
        words = unused if isinstance(unused, str) else " of ".join(part for part in unused[::-1] if part)
        raise AdapterError(f"{directory}: {words} is no parameter of the passes that were made for it.")
    names = [*_trained(tuned, len(program.history)), *(name for name in tuned.table.state if name in tensors)]
    wanted = {name: tuned.table[name].tensor for name in names}
    check_fit(tensors, wanted, directory)
    with torch.no_grad():
        for name, value in tensors.items():
            wanted[name].copy_(value)
    return tuned


def _trained(program: ProgramData, since: int) -> list[str]:
    """Return the trainable parameters of the passes from number `since` on."""
    names = [name for edit in program.edits if edit.application >= since for name in edit.parameters]
    return [name for name in names if program.table[name].trainable]
