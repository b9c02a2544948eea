"""Operators and values as a drawing sees them: which only move a value, and where two computations are the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx

# Operators that move a value without computing, seen from far away; a dropout is told by the pass's spec.
MOVES = {
    "view", "reshape", "transpose", "permute", "t", "expand", "unsqueeze", "squeeze", "slice", "select", "flatten",
    "unflatten", "contiguous", "clone", "detach", "to", "_to_copy", "dropout", "index_select", "alias", "type_as",
    "getitem",
}  # fmt: skip
SCATTERS = {"slice_scatter": 1, "index_copy": 3}  # which operand holds the new part
FRESH = {"sym_size", "new_zeros", "new_full", "new_ones", "zeros_like", "ones_like", "full_like"}
LOOKS_UP = {"embedding", "gather", "index", "take_along_dim"}
PRODUCTS = {"linear", "matmul", "mm", "bmm", "einsum", "embedding", "addmm", "conv1d", "conv2d", "grouped_mm"}


def differences(new: fx.Node, old: fx.Node) -> Iterator[tuple[fx.Node, fx.Node, fx.Node]]:
    """Yield where the computation of `new` departs from that of `old`: the old operand, the new one, and the reader of
    the old one."""
    if new.target != old.target or len(new.all_input_nodes) != len(old.all_input_nodes):
        yield old, new, old
        return
    for before, after in zip(old.all_input_nodes, new.all_input_nodes, strict=True):
        if after.name != before.name:
            if after.target == before.target and after.op == "call_function" and operator(after) != "cat":
                yield from differences(after, before)
            else:
                yield before, after, old


def alike(new: Any, old: Any, start: fx.Node, bound: list[fx.Node]) -> bool:
    """Tell whether `new` equals `old` with one value in place of `start`; that value is stored in `bound`."""
    if isinstance(new, fx.Node) and isinstance(old, fx.Node):
        if old is start:
            bound.append(new)
            return all(one is new for one in bound)
        if new.name == old.name:
            return True
        same = new.op == old.op == "call_function" and new.target == old.target
        return same and alike([*new.args, *new.kwargs.values()], [*old.args, *old.kwargs.values()], start, bound)
    if isinstance(new, list | tuple) and isinstance(old, list | tuple):
        return len(new) == len(old) and all(alike(a, b, start, bound) for a, b in zip(new, old, strict=True))
    return type(new) is type(old) and new == old


def operator(node: fx.Node) -> str:
    """Return the operator of a node, without its overload."""
    target = node.target
    schema = getattr(target, "_schema", None)
    found = schema.name.rpartition("::")[2] if schema else getattr(target, "__name__", str(target))
    return found.removesuffix("_fallback").rstrip("_")


def operand(node: fx.Node, place: int) -> fx.Node:
    operand = node.args[place]
    assert isinstance(operand, fx.Node)
    return operand
