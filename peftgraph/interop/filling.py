"""Passes whose parameters are given: applied, then filled."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from peftgraph.errors import AdapterError
from peftgraph.ir.program import ProgramData
from peftgraph.rewrite.method import Pass

P = TypeVar("P", bound=ProgramData)
Key = tuple[str, str] | str
COMMON = ""  # in the place of a site's id: what all sites of a pass share


@dataclass(frozen=True)
class Filled:
    """A pass and the values of its parameters.

    Attributes:
        method: the pass.
        values: by (id of a site, last part of the name) for what the pass makes there, by (COMMON, last part) for
            what its sites share, and by the whole name for a parameter of the base that it trains.
        remark: what the user should know of it, or nothing.
    """

    method: Pass
    values: Mapping[Key, Tensor] = field(repr=False)
    remark: str = ""


def applied(apply: Callable[..., P], methods: Sequence[Pass], directory: Path) -> P:
    """The program after `methods`, whose initial values are overwritten: the user's random generator stays put.

    Raises:
        AdapterError: an absurd width or rank.
    """
    try:
        with torch.random.fork_rng(devices=[]):
            return apply(*methods)
    except (RuntimeError, MemoryError, OverflowError) as error:
        raise AdapterError(f"{directory}: its recipe cannot be applied: {error}") from None


def renamed(methods: Sequence[Pass], name: str | None, directory: Path) -> list[Pass]:
    """The passes under another name, if there is one.

    Raises:
        AdapterError: one name cannot stand for two passes of one kind.
    """
    if name is None:
        return list(methods)
    words = [method.word for method in methods]
    twice = next((word for word in words if words.count(word) > 1), None)
    if twice is not None:
        raise AdapterError(f"{directory} holds more than one {twice}; one name cannot stand for both.")
    return [method.renamed(name) for method in methods]


def check_fit(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], directory: Path) -> None:
    """Refuses tensors that are not, one for one, of the shapes that are wanted.

    Raises:
        AdapterError: names the first that does not fit.
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


def fill(program: P, apply: Callable[..., P], parts: Sequence[Filled], directory: Path) -> P:
    """The program after the passes of `parts`, with their values.

    Raises:
        AdapterError: a value fits no parameter, or a parameter has no value.
    """
    tuned = applied(apply, [part.method for part in parts], directory)
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
            keys: list[Key] = [(edit.site, leaf), (COMMON, leaf)] if added else [*replaced, name]
            found = next((key for key in keys if key in values), None)
            if found is not None:
                value = values.pop(found)
                tensors.setdefault(name, value)  # uses of one weight share their parameters
    tensors |= {name: values.pop(name) for name in tuned.table.state if name in values}
    unused = next(iter(values), None)
    if unused is not None:
        words = unused if isinstance(unused, str) else " of ".join(part for part in unused[::-1] if part)
        raise AdapterError(f"{directory}: {words} is no "
                           "parameter of the passes that were made for it.")  # fmt: skip
    names = [*_trained(tuned, len(program.history)), *(name for name in tuned.table.state if name in tensors)]
    wanted = {name: tuned.table[name].tensor for name in names}
    check_fit(tensors, wanted, directory)
    with torch.no_grad():
        for name, value in tensors.items():
            wanted[name].copy_(value)
    return tuned


def _trained(program: ProgramData, since: int) -> list[str]:
    names = [name for edit in program.edits if edit.application >= since for name in edit.parameters]
    return [name for name in names if program.table[name].trainable]
