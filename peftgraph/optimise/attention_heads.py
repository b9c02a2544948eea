"""Shortens what surrounds an attention: repeated heads of keys and values, the rotation of halves."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from peftgraph.optimise.clean_up import remove_unused, same_sizes, value_of
from peftgraph.optimise.insertion import Inserter

aten = torch.ops.aten
ATTENTION = aten.scaled_dot_product_attention.default
END = 2**62  # from here on, an end of a slice is that of the axis


def group_queries(graph: fx.Graph) -> None:
    """Let attentions read keys and values once for each group of queries, in place of copies of them."""
    for node in graph.find_nodes(op="call_function", target=ATTENTION):
        keys, values = (_repeated(one) for one in node.args[1:3])
        if keys is None or values is None or node.kwargs.get("enable_gqa"):
            continue
        if same_sizes(value_of(keys).shape[:2], value_of(values).shape[:2]):
            node.args = (node.args[0], keys, values, *node.args[3:])
            node.kwargs = {**node.kwargs, "enable_gqa": True}
    remove_unused(graph)


def _repeated(node: Any) -> fx.Node | None:
    """Return the value (B, H, S, D) each head of which `node` repeats several times in a row."""
    if node.target not in (aten.reshape.default, aten.view.default):
        return None
    expanded: Any = node.args[0]
    if expanded.target is not aten.expand.default:
        return None
    single: Any = expanded.args[0]
    if single.target is not aten.unsqueeze.default or single.args[1] != 2:
        return None
    source: Any = single.args[0]
    before, wide, after = value_of(source).shape, value_of(expanded).shape, value_of(node).shape
    if len(before) != 4 or len(wide) != 5 or not same_sizes([*wide[:2], *wide[3:]], before):
        return None
    heads, times = before[1], wide[2]
    if not isinstance(heads, int) or not isinstance(times, int):
        return None
    return source if same_sizes([before[0], heads * times, *before[2:]], after) else None


def rotate_halves(graph: fx.Graph) -> None:
    """Turn x c + cat(-x2, x1) s into x c + roll(x) s', where s' has the signs, in place."""
    make = Inserter(graph)
    for node in list(graph.nodes):
        if node.target is not aten.mul.Tensor:
            continue
        for turned, table in (node.args, node.args[::-1]):
            found = _rotation(turned)
            if found is None or not isinstance(table, fx.Node) or value_of(table).shape[-1] != found[1]:
                continue
            _rotate(make, node, table, *found)
            break
    remove_unused(graph)


def _rotate(make: Inserter, node: fx.Node, table: fx.Node, x: fx.Node, width: int) -> None:
    """Replace a product by the rotated value times the table with signs; a sum that reads it takes it in."""
    half = width // 2
    with make.graph.inserting_before(node):
        rolled = make.call(aten.roll.default, x, [half], [-1])
    with make.graph.inserting_before(table.next):
        low = make.call(aten.neg.default, make.call(aten.slice.Tensor, table, -1, 0, half))
        signed = make.call(aten.cat.default, [low, make.call(aten.slice.Tensor, table, -1, half, width)], -1)
    total = next(iter(node.users))
    others = [one for one in total.args if one is not node]
    if len(node.users) == 1 and total.target is aten.add.Tensor and not total.kwargs and len(others) == 1:
        with make.graph.inserting_before(total):
            new = make.call(aten.addcmul.default, others[0], rolled, signed)
        total.replace_all_uses_with(new)
        make.graph.erase_node(total)
    else:
        with make.graph.inserting_before(node):
            node.replace_all_uses_with(make.call(aten.mul.Tensor, rolled, signed))


def _rotation(node: Any) -> tuple[fx.Node, int] | None:
    """Return the value of which `node` is the two halves exchanged, the first of them negative, and its width."""
    if not isinstance(node, fx.Node) or node.target is not aten.cat.default or len(node.users) > 1:
        return None
    parts: Any = node.args[0]
    if len(parts) != 2 or parts[0].target is not aten.neg.default:
        return None
    high, low = parts[0].args[0], parts[1]
    if high.target is not aten.slice.Tensor or low.target is not aten.slice.Tensor or high.args[0] is not low.args[0]:
        return None
    x: Any = high.args[0]
    rank, width = value_of(x).dim(), value_of(x).shape[-1]
    axis: Any = node.args[1] if len(node.args) > 1 else 0
    if not isinstance(width, int) or width % 2 or axis % rank != rank - 1:
        return None
    half = width // 2
    ends = [_bounds(one, rank, width) for one in (high, low)]
    return (x, width) if ends == [(rank - 1, half, width), (rank - 1, 0, half)] else None


def _bounds(node: fx.Node, rank: int, width: int) -> Any:
    axis, start, end, step = (*node.args[1:], *(0, 0, END, 1)[len(node.args) - 1 :])
    if type(axis) is not int or type(end) is not int or step != 1:
        return None
    return axis % rank, start, min(end, width)
