"""Weights that are computed from codes, in plain aten operations: files of a program keep the codes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from peftgraph.ir.quantised import DEQUANTISE_4BIT, INT8_STEP, NESTED_BLOCK, DequantisedProduct, in_dtype

aten = torch.ops.aten


def spell_product(graph: fx.Graph, node: fx.Node) -> None:
    """Replace, in place, a product that dequantises its weight by the dequantiser and the product."""
    target = node.target
    assert isinstance(target, DequantisedProduct)
    codes: Any
    codes, operands = node.args
    call = graph.call_function
    with graph.inserting_before(node):
        assert isinstance(operands, tuple | list)
        x: Any = operands[target.factor]
        dtype: Any = node.kwargs.get("compute") or x.meta["val"].dtype
        weight = _known(call(target.dequantise, in_dtype(codes, dtype)))
        for step, arguments in target.route:
            arguments = [list(one) if isinstance(one, tuple) else one for one in arguments]
            weight = _known(call(step, (weight, *arguments)))
        given = [_cast(graph, one, dtype) for one in operands]
        given.insert(target.position, _cast(graph, weight, dtype))
        result = call(target.product, tuple(given), dict(target.keywords))
        result.meta = dict(node.meta) | {"val": node.meta["val"].to(dtype)}
        back = _cast(graph, result, x.meta["val"].dtype)
    node.replace_all_uses_with(back)
    graph.erase_node(node)


def _cast(graph: fx.Graph, operand: Any, dtype: torch.dtype) -> Any:
    """Return a floating operand in some dtype; any other as it is."""
    value = operand.meta["val"] if isinstance(operand, fx.Node) else None
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.dtype == dtype:
        return operand
    return _known(graph.call_function(aten.to.dtype, (operand, dtype)))


def _known(node: fx.Node) -> fx.Node:
    """Return a call with its value under fake tensors."""
    assert not isinstance(node.target, str)
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda operand: operand.meta["val"])
    node.meta["val"] = node.target(*args, **kwargs)
    return node


def spell_dequantiser(graph: fx.Graph, node: fx.Node) -> None:
    """Replace, in place, a dequantiser by plain operations that compute the same values, to the bit."""
    with graph.inserting_before(node):
        arguments: Any = node.args
        spelled = (_four_bits if node.target is DEQUANTISE_4BIT else _int8)(graph, *arguments)
    node.replace_all_uses_with(spelled)
    graph.erase_node(node)


def _int8(graph: fx.Graph, codes: Any, absmax: Any, dtype: torch.dtype) -> fx.Node:
    call = graph.call_function
    wide = call(aten.to.dtype, (codes, torch.float32))
    scaled = call(aten.mul.Tensor, (wide, call(aten.unsqueeze.default, (absmax, -1))))
    return call(aten.to.dtype, (call(aten.mul.Tensor, (scaled, INT8_STEP)), dtype))


def _four_bits(
    graph: fx.Graph, codes: Any, table: Any, absmax: Any, block: int, shape: Any, dtype: torch.dtype,
    nested_table: Any = None, nested_absmax: Any = None, offset: Any = None,
) -> fx.Node:  # fmt: skip
    call, count = graph.call_function, math.prod(shape)
    if nested_table is not None:
        constants = call(aten.index_select.default, (nested_table, 0, _numbers(graph, absmax)))
        blocks = -(-count // block)
        scaled = _scaled(graph, constants, nested_absmax, blocks, NESTED_BLOCK)
        absmax = call(aten.add.Tensor, (scaled, offset))
    numbers = _numbers(graph, codes)
    halves = [
        call(aten.floor_divide.default, (numbers, 16)),
        call(aten.remainder.Scalar, (numbers, 16)),
    ]
    found = [call(aten.index_select.default, (table, 0, half)) for half in halves]
    values = call(aten.reshape.default, (call(aten.stack.default, (found, 1)), [-1]))
    if count % 2:
        values = call(aten.slice.Tensor, (values, 0, 0, count))
    scaled = _scaled(graph, values, absmax, count, block)
    return call(aten.to.dtype, (call(aten.reshape.default, (scaled, list(shape))), dtype))


def _numbers(graph: fx.Graph, codes: Any) -> fx.Node:
    flat = graph.call_function(aten.reshape.default, (codes, [-1]))
    return graph.call_function(aten.to.dtype, (flat, torch.int64))


def _scaled(graph: fx.Graph, values: fx.Node, constants: Any, count: int, block: int) -> fx.Node:
    """Values (N,) times the constant of their block."""
    call, more = graph.call_function, -count % block
    if more:
        values = call(aten.constant_pad_nd.default, (values, [0, more]))
    rows = call(aten.reshape.default, (values, [-1, block]))
    flat = call(
        aten.reshape.default, (call(aten.mul.Tensor, (rows, call(aten.unsqueeze.default, (constants, -1)))), [-1])
    )
    return call(aten.slice.Tensor, (flat, 0, 0, count)) if more else flat
