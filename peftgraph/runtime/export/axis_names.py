"""Names for the dynamic axes of exported files: `batch`, `sequence`, and one name for each further size."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.export import ExportedProgram

PICTURE = {2: "height", 3: "width"}


def axis_names(exported: ExportedProgram) -> dict[str, str]:
    """Return a name for each symbolic size of the inputs, by its symbol.

    A first axis is a batch. A size of its own that no output has, such as that of a mask's first axis, can only be one
    of the other batches, to which it is broadcast, so it gets the name of the first one. Sizes of an adapter's tensors
    have the names of the tensors.
    """
    inputs = list(_inputs(exported))
    among_outputs = _symbols_of_outputs(exported)
    names: dict[str, str] = {}
    for key, shape in inputs:
        for axis, size in enumerate(shape):
            symbol = str(size)
            if not isinstance(size, torch.SymInt) or not symbol.isidentifier() or symbol in names:
                continue
            if key.startswith("adapter_tensors_"):
                names[symbol] = f"{key}_{axis}".removeprefix("adapter_tensors_")
                continue
            if axis == 0 and "batch" in names.values() and symbol not in among_outputs:
                names[symbol] = "batch"
                continue
            wanted = _name(key, axis, len(shape))
            own = f"{_part(key)}_{wanted}"
            names[symbol] = next(one for one in (wanted, own, f"{key}_{axis}") if one not in names.values())
    return names


def renamed(dim: str, names: dict[str, str]) -> str:
    """Return the text of a size with the symbols in it renamed: `s53 + 10` is `sequence + 10`."""
    return re.sub(r"[A-Za-z_]\w*", lambda found: names.get(found[0], found[0]), dim)


def _name(key: str, axis: int, dims: int) -> str:
    if axis == 0:
        return "batch"
    if key.startswith("past") or "cache" in key:
        return "past_sequence"
    if dims == 4 and axis in PICTURE:
        return PICTURE[axis]
    return "sequence" if axis == 1 else f"{key}_{axis}"


def _part(key: str) -> str:
    """Return what an input's name says of its part of the model: "decoder" of "decoder_input_ids"."""
    return re.sub(r"_(input_)?(ids|values|features|mask)$", "", key)


def _inputs(exported: ExportedProgram) -> Iterator[tuple[str, Sequence[Any]]]:
    names = set(exported.graph_signature.user_inputs)
    for node in exported.graph.nodes:
        if node.op == "placeholder" and node.name in names and isinstance(node.meta["val"], torch.Tensor):
            yield str(node.name), node.meta["val"].shape


def _symbols_of_outputs(exported: ExportedProgram) -> set[str]:
    leaves = exported.graph.output_node().args[0]
    assert isinstance(leaves, list | tuple)
    shapes = [leaf.meta["val"].shape for leaf in leaves if isinstance(leaf, torch.fx.Node) and "val" in leaf.meta]
    return {word for shape in shapes for size in shape for word in re.findall(r"[A-Za-z_]\w*", str(size))}
