"""Which values are the base's own on rows of no adapter, where parameters are zeros, ones or the base's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

aten = torch.ops.aten

Fill = Literal["zero", "one", "base", "other"]

# Zero where their first operand is.
KEEP_ZERO = {
    aten.reshape.default,
    aten.view.default,
    aten.view_as.default,
    aten.transpose.int,
    aten.permute.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.flatten.using_ints,
    aten.expand.default,
    aten.slice.Tensor,
    aten.contiguous.default,
    aten.dropout.default,
    aten.relu.default,
    aten.gelu.default,
    aten.silu.default,
    aten.tanh.default,
    aten.neg.default,
    aten.to.other,
    aten.to.dtype,
    aten.type_as.default,
    aten.movedim.int,
}
PRODUCTS = {aten.linear.default, aten.matmul.default, aten.mm.default}
GROUPED_PRODUCTS = ("transformers.grouped_mm_fallback", "aten._grouped_mm")  # of rows and the matrices of experts
CONVOLUTIONS = {aten.conv1d.default, aten.conv2d.default, aten.conv3d.default}


@dataclass(frozen=True)
class Known:
    """What is known of a value on rows of no adapter.

    Attributes:
        fill: "zero" or "one" everywhere, "base" for a parameter that is the base's.
        same: the value that it equals; None for none.
    """

    fill: Fill = "other"
    same: Any = None


UNKNOWN = Known()


def known_result(node: fx.Node, operands: Sequence[Any], known: Sequence[Known]) -> Known:
    """Return what is known of the result of a call; of an einsum, whose operands are a list, `known_einsum` tells.

    Args:
        node: the call, in the adapter's graph.
        operands: its first arguments as they are computed: nodes, stacks or literals.
        known: of each.
    """
    target: Any = node.target
    fills = [one.fill for one in known]
    if target in KEEP_ZERO:
        return Known("zero") if fills[0] == "zero" else UNKNOWN
    if target is aten.index_select.default:
        return UNKNOWN if fills[0] == "base" else Known(known[0].fill)
    if str(target).startswith(GROUPED_PRODUCTS):
        return Known("zero") if "zero" in fills[:2] else UNKNOWN
    if target in PRODUCTS or target in CONVOLUTIONS:
        bias = known[2].fill if len(operands) > 2 and operands[2] is not None else "zero"
        return Known("zero") if "zero" in fills[:2] and bias == "zero" else UNKNOWN
    if target is aten.embedding.default:
        return Known("zero") if fills[0] == "zero" else UNKNOWN
    if target is aten.mul.Tensor:
        return _product(operands, known)
    if target in (aten.add.Tensor, aten.sub.Tensor) and not node.kwargs:
        return _sum(target, operands, known)
    if target is aten.slice_scatter.default:
        return _scattered(operands, known)
    if target is aten.index_copy.default:
        return _copied(operands, known)
    return UNKNOWN


def known_einsum(known: Sequence[Known]) -> Known:
    """Return what is known of an einsum of operands."""
    return Known("zero") if any(one.fill == "zero" for one in known) else UNKNOWN


def itself(value: Any, known: Known) -> Any:
    """Return the value that one equals on rows of no adapter."""
    return value if known.same is None else known.same


def _product(operands: Sequence[Any], known: Sequence[Known]) -> Known:
    (a, b), (left, right) = operands[:2], known[:2]
    if "zero" in (left.fill, right.fill):
        return Known("zero")
    if right.fill == "one":
        return Known(left.fill, itself(a, left))
    return Known(right.fill, itself(b, right)) if left.fill == "one" else UNKNOWN


def _sum(target: Any, operands: Sequence[Any], known: Sequence[Known]) -> Known:
    (a, b), (left, right) = operands[:2], known[:2]
    if left.fill == right.fill == "zero":
        return Known("zero")
    if right.fill == "zero":
        return Known(left.fill, itself(a, left))
    return Known(right.fill, itself(b, right)) if left.fill == "zero" and target is aten.add.Tensor else UNKNOWN


def _scattered(operands: Sequence[Any], known: Sequence[Known]) -> Known:
    """Return what is known of a value with a window that was replaced: itself, if the window is unchanged."""
    whole, part, *window = operands
    source = itself(part, known[1])
    unchanged = (
        isinstance(source, fx.Node)
        and source.target is aten.slice.Tensor
        and [source.args[0], *source.args[1:]] == [whole, *window]
    )
    return Known(same=itself(whole, known[0])) if unchanged else UNKNOWN


def _copied(operands: Sequence[Any], known: Sequence[Known]) -> Known:
    whole, axis, index, part = operands[:4]
    source = itself(part, known[3])
    unchanged = (
        isinstance(source, fx.Node)
        and source.target is aten.index_select.default
        and source.args[:2] == (whole, axis)
        and _target(source.args[2]) == _target(index)
    )
    return Known(same=itself(whole, known[0])) if unchanged else UNKNOWN


def _target(node: Any) -> Any:
    return node.target if isinstance(node, fx.Node) else None
