"""Applies the forms in which passes store their parameters (`Pass.pack`): of a sparse difference, its entries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from peftgraph.errors import AdapterError
from peftgraph.ir.program import ProgramData
from peftgraph.rewrite.method import Pass


def packed(program: ProgramData, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of an adapter as its file stores them.

    Args:
        program: of the adapter.
        tensors: its parameters by full name.
    """
    found = dict(tensors)
    for method, own in _packing(program, 0):
        names = [name for name in own if name in found]
        if names:
            prefix = names[0].rpartition(".")[0]
            stored = method.pack({name.rpartition(".")[2]: found.pop(name) for name in names})
            found |= {f"{prefix}.{short}": value.contiguous() for short, value in stored.items()}
    return found


def unpacked(
    program: ProgramData, since: int, tensors: Mapping[str, Tensor], targets: Mapping[str, str], directory: Path
) -> dict[str, Tensor]:
    """Return the inverse of `packed`, by the names in the file.

    Args:
        program: with fresh parameters.
        since: the index of the first pass of the adapter.
        tensors: of the file.
        targets: the names of the parameters in the file, each with that in the program.
        directory: of the adapter, for messages.

    Raises:
        AdapterError: the stored form is damaged.
    """
    found, saved = dict(tensors), {new: old for old, new in targets.items()}
    for method, own in _packing(program, since):
        names = [name for name in own if name in saved]
        if not names:
            continue
        prefix = saved[names[0]].rpartition(".")[0]
        like = {name.rpartition(".")[2]: program.table[name].tensor.detach() for name in names}
        mine = {name for name in found if name.rpartition(".")[0] == prefix}
        mine -= targets.keys() - {saved[name] for name in names}
        stored = {name.rpartition(".")[2]: found.pop(name) for name in mine}
        try:
            values = method.unpack(stored, like)
        except (KeyError, IndexError, RuntimeError) as error:
            raise AdapterError(f"{directory}: what is stored of {prefix} is damaged: {error}") from None
        found |= {f"{prefix}.{short}": value for short, value in values.items()}
    return found


def _packing(program: ProgramData, since: int) -> Iterator[tuple[Pass, tuple[str, ...]]]:
    """Yield the passes that have a stored form of their own, with the parameters of each edit."""
    for edit in program.edits:
        method = program.history[edit.application].method
        if edit.application >= since and type(method).pack is not Pass.pack:
            yield method, edit.parameters
