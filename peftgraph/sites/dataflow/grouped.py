"""Keys and values as their projections give them, before each is repeated for the queries that share it."""

from __future__ import annotations

from typing import Final

from torch import fx

from peftgraph.sites.dataflow import ops
from peftgraph.sites.dataflow.flow import Flow

PASSING: Final = {"contiguous", "clone", "alias", "reshape", "view", "_unsafe_view", "unsqueeze", "expand", "slice"}

FLATTENING: Final = {"reshape", "view", "_unsafe_view", "flatten"}


def rows_by_head(flow: Flow, operand: fx.Node) -> fx.Node:
    """Return an operand of a core as (batch, heads, positions, features): not transposed, heads and batch apart, and
    not repeated over heads.

    Only repeats of each head in place (head j of the operand is head j // n of the result) are undone.
    """
    node = _apart(flow, untransposed(flow, operand))
    shape = flow.shape(node)
    source = _before_repeat(flow, node) if len(shape) == 4 else None
    return node if source is None else source


def untransposed(flow: Flow, node: fx.Node) -> fx.Node:
    """Return the value whose last two axes are swapped, also where the swapped value is scaled as a whole."""
    swap = node
    while ops.name(swap) in ops.SCALE and all(one is swap.args[0] for one in swap.all_input_nodes if flow.shape(one)):
        swap = flow.operands(swap)[0]
    return flow.operands(swap)[0] if _swaps(flow, swap) else node


def _swaps(flow: Flow, node: fx.Node) -> bool:
    """Tell whether a node swaps the last two axes, and no others."""
    rank, kind = len(flow.shape(node)), ops.name(node)
    if kind == "permute" and isinstance(node.args[1], list | tuple):
        order = [axis % rank for axis in node.args[1] if isinstance(axis, int)]
        return order == [*range(rank - 2), rank - 1, rank - 2]
    axes = {axis % rank for axis in node.args[1:3] if isinstance(axis, int)}
    return kind == "mT" or (kind in ("transpose", "swapaxes") and axes == {rank - 2, rank - 1})


def _apart(flow: Flow, node: fx.Node) -> fx.Node:
    """Undo the flattening of (B, H, T, D) to (B H, T, D), if that is how the value was made."""
    shape, source = flow.shape(node), flow.operands(node)[0] if ops.name(node) in FLATTENING else node
    inner = flow.shape(source)
    flattened = len(shape) == 3 and len(inner) == 4 and shape == (inner[0] * inner[1], *inner[2:])
    return source if flattened else node


def _before_repeat(flow: Flow, node: fx.Node) -> fx.Node | None:
    """Return the value whose heads `node` repeats: (B, G, T, D) -> (B, G, 1, T, D) -> (B, G, n, T, D) -> (B, G n, T,
    D)."""
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
