"""Keys and values as their projections give them, before each is repeated for the queries that share it."""

from __future__ import annotations

from typing import Final

from torch import fx

from . import ops
from .flow import Flow

PASSING: Final = {"contiguous", "clone", "alias", "reshape", "view", "_unsafe_view", "unsqueeze", "expand", "slice"}


def rows_by_head(flow: Flow, operand: fx.Node) -> fx.Node:
    """An operand of a core as (batch, heads, positions, features): not transposed, and not repeated over heads.

    Only repeats of each head in place (head j of the operand is head j // n of the result) are undone.
    """
    node = _untransposed(flow, operand)
    shape = flow.shape(node)
    source = _before_repeat(flow, node) if len(shape) == 4 else None
    return node if source is None else source


def _untransposed(flow: Flow, node: fx.Node) -> fx.Node:
    rank = len(flow.shape(node))
    axes = {axis % rank for axis in node.args[1:3] if isinstance(axis, int)}
    if ops.name(node) == "mT" or (ops.name(node) in ("transpose", "swapaxes") and axes == {rank - 2, rank - 1}):
        return flow.operands(node)[0]
    return node


def _before_repeat(flow: Flow, node: fx.Node) -> fx.Node | None:
    """The value whose heads `node` repeats: (B, G, T, D) -> (B, G, 1, T, D) -> (B, G, n, T, D) -> (B, G n, T, D)."""
    if ops.name(node) == "repeat_interleave":
        return flow.operands(node)[0] if node.args[2:3] in ((1,), (-3,)) else None
    shape, here, opened = flow.shape(node), node, False
    while ops.name(here) in PASSING:
        below = flow.operands(here)[0]
        inner = flow.shape(below)
        if ops.name(here) == "slice" and inner != flow.shape(here):
            return None
        opened |= (
            ops.name(here) == "expand"
            and len(inner) == 5
            and inner[2] == 1
            and inner[:2] + inner[3:] == (shape[0], inner[1], *shape[2:])
        )
        if opened and len(inner) == 4:
            same = inner[0] == shape[0] and inner[2:] == shape[2:] and shape[1] % inner[1] == 0
            return below if same and inner[1] < shape[1] else None
        here = below
    return None
