"""Projections: a signal contracted with a raw weight, in every spelling.

linear, addmm (Conv1D), matmul, einsum, 1x1 convolution and grouped_mm (experts) become one description:
which node,
which operand, which axes of the result are its features, and where the weight and the bias are stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from . import ops
from .einsum import letters, operands
from .flow import Flow
from .site import Bias, Columns, Weight
from .tags import Tagger, along, in_order, squeeze_constant, varies


@dataclass(frozen=True, eq=False)
class Projection:
    """y = x W^T + b.

    `axes`: the axes of the result that are features, `width` of them in all; `offsets`: where each expert's rows end
    (grouped_mm); `chosen`: the expert of each row (gathered weights); `input_axis`: the axis of x that is contracted.
    """

    node: fx.Node
    input: fx.Node
    output: fx.Node
    weight: Weight
    bias: Bias | None
    axes: tuple[int, ...]
    width: int
    expert: int | None = None
    offsets: fx.Node | None = None
    chosen: fx.Node | None = None
    input_axis: int = -1


@dataclass(frozen=True)
class Contraction:
    """Operands of a product; axes of the operand `weight` that are contracted, and that become features."""

    x: fx.Node
    weight: fx.Node
    inner: tuple[int, ...]
    outer: tuple[int, ...]
    axes: tuple[int, ...]
    bias: fx.Node | None = None
    offsets: fx.Node | None = None
    input_axis: int = -1


def projection(flow: Flow, node: fx.Node) -> Projection | None:
    """The projection that `node` computes; None where it computes something else."""
    found = contraction(flow, node)
    if found is None or not (flow.signal(found.x) or ops.name(node) == "linear"):  # a learned query is projected too
        return None
    stored = store(flow, found)
    if stored is None:
        return None
    weight, expert = stored
    shape = flow.shape(node)
    width = 1
    for axis in found.axes:
        width *= shape[axis]
    bias, output = _bias(flow, node, found)
    window = weight.window if expert is None else None
    return Projection(
        node=node,
        input=found.x,
        output=output,
        weight=weight,
        bias=None if bias is None else Bias(bias, _bias_window(flow, bias, width, window)),
        axes=found.axes,
        width=width,
        expert=expert,
        offsets=found.offsets,
        chosen=flow.picks(found.weight),
        input_axis=found.input_axis,
    )


def contraction(flow: Flow, node: fx.Node) -> Contraction | None:
    """The product of a signal and a raw weight in `node`."""
    kind = ops.name(node)
    inputs = [one for one in node.args if isinstance(one, fx.Node)]
    if kind == "linear" and flow.raw(inputs[1]):
        return Contraction(inputs[0], inputs[1], (-1,), (-2,), (-1,), bias=ops.operand(node, 2, "bias"))
    if kind in ("conv1d", "conv2d", "conv3d"):
        return _pointwise(flow, node, inputs)
    if kind in ("addmm", "baddbmm") and len(inputs) > 2 and flow.raw(inputs[2]):
        return Contraction(inputs[1], inputs[2], (-2,), (-1,), (-1,), bias=inputs[0])
    if kind in ("mm", "matmul", "bmm") and flow.raw(inputs[1]) and len(flow.shape(inputs[1])) > 1:
        return Contraction(inputs[0], inputs[1], (-2,), (-1,), (-1,))
    if kind in ("mm", "matmul", "bmm") and flow.raw(inputs[0]) and len(flow.shape(inputs[0])) > 1:
        return Contraction(inputs[1], inputs[0], (-1,), (-2,), (-2,), input_axis=-2)
    if kind in ops.GROUPED and flow.raw(inputs[1]):
        return Contraction(inputs[0], inputs[1], (-2,), (-1,), (-1,), offsets=ops.operand(node, 2, "offs"))
    return _einsum(flow, node) if kind == "einsum" else None


def _einsum(flow: Flow, node: fx.Node) -> Contraction | None:
    inputs, named = operands(node), letters(node)
    if named is None or len(inputs) != 2 or flow.raw(inputs[0]) == flow.raw(inputs[1]):
        return None
    side = 0 if flow.raw(inputs[0]) else 1
    weight, other, result = named[0][side], named[0][1 - side], named[1]
    outer = [letter for letter in result if letter in weight and letter not in other]
    inner = [letter for letter in weight if letter in other and letter not in result]
    if not outer or not inner:
        return None
    return Contraction(
        inputs[1 - side],
        inputs[side],
        tuple(weight.index(letter) for letter in inner),
        tuple(weight.index(letter) for letter in outer),
        tuple(result.index(letter) for letter in outer),
    )


def _pointwise(flow: Flow, node: fx.Node, inputs: list[fx.Node]) -> Contraction | None:
    """A convolution whose kernel is one point and that does not group channels is a projection."""
    shape = flow.shape(inputs[1])
    groups = ops.argument(node, 6, "groups")
    if not flow.raw(inputs[1]) or any(size != 1 for size in shape[2:]) or groups not in (None, 1):
        return None
    return Contraction(
        inputs[0],
        inputs[1],
        (1,),
        (0,),
        (1,),
        bias=ops.operand(node, 2, "bias"),
        input_axis=1 - len(flow.shape(inputs[0])),
    )


def store(flow: Flow, found: Contraction) -> tuple[Weight, int | None] | None:
    """Where the weight operand is stored, by running its path on index tensors; and the expert it picks."""
    leaf = flow.leaf(found.weight)
    if leaf is None:
        return None
    sizes = flow.shape(leaf)
    rank = len(flow.shape(found.weight))
    if len(sizes) < 2:
        return None
    if leaf is found.weight or _plain(flow, found.weight):
        weight, expert = _direct(leaf, sizes, found, rank, flow)
        rearranged = weight.experts is None and flow.picks(found.weight) is not None
        return None if rearranged else (weight, expert)  # an index into features has them in another order
    return _traced(flow, found, leaf, sizes, rank)


def _plain(flow: Flow, node: fx.Node) -> bool:
    """Only casts, or the choice of whole experts by index, stand between the stored parameter and its use."""
    node = flow.uncast(node)
    if ops.name(node) in ("index", "index_select") and flow.picks(node) is not None:
        node = flow.uncast(flow.operands(node)[0])
    return node.op == "get_attr"


def _direct(
    leaf: fx.Node, sizes: tuple[int, ...], found: Contraction, rank: int, flow: Flow
) -> tuple[Weight, int | None]:
    used = {axis % rank for axis in (*found.inner, *found.outer)}
    experts = sizes[0] if 0 not in used else None
    transposed = min(a % rank for a in found.inner) < min(a % rank for a in found.outer)
    return Weight(str(leaf.target), transposed, None, experts), None


def _traced(
    flow: Flow, found: Contraction, leaf: fx.Node, sizes: tuple[int, ...], rank: int
) -> tuple[Weight, int | None] | None:
    """Seed the stored parameter along each of its axes and see which axis of the operand varies."""
    outer: list[tuple[int, torch.Tensor]] = []
    inner: list[int] = []
    expert: int | None = None
    experts: int | None = None
    for axis in range(len(sizes)):
        tags = Tagger(flow, {leaf: along(sizes, (axis,))}).run(found.weight)
        if tags.dim() != rank:
            return None
        rows = _only(tags, {a % rank for a in found.outer})
        if rows is not None:
            numbers = in_order(rows)
            if rows.numel() != numbers.numel():
                return None  # a feature stands in two places, or in none
            outer.append((axis, numbers))
        elif (columns := _only(tags, {a % rank for a in found.inner})) is not None:
            if not torch.equal(columns.flatten(), torch.arange(1, sizes[axis] + 1)):
                return None  # a site has a window of outputs, and all inputs in their order
            inner.append(axis)
        elif squeeze_constant(tags).dim() == 0:
            expert = None if flow.picks(found.weight) else int(squeeze_constant(tags).item()) - 1
            experts = sizes[axis]
        else:
            experts = sizes[axis]
    if not outer:
        return None
    window = None
    if len(outer) == 1 and not torch.equal(outer[0][1], torch.arange(1, sizes[outer[0][0]] + 1)):
        window = Columns.from_indices(outer[0][1] - 1)
    transposed = bool(inner) and min(inner) < outer[0][0]
    return Weight(str(leaf.target), transposed, window, experts if len(sizes) > 2 and inner else None), expert


def _only(tags: torch.Tensor, axes: set[int]) -> torch.Tensor | None:
    """The tags along `axes` if they vary there and nowhere else."""
    for axis in range(tags.dim()):
        if varies(tags, axis) and axis not in axes:
            return None
    kept = squeeze_constant(tags)
    return kept if kept.dim() > 0 else None


def _bias(flow: Flow, node: fx.Node, found: Contraction) -> tuple[str | None, fx.Node]:
    """The bias added by the operator itself or right after it, and the node that holds the biased value."""
    if found.bias is not None:
        leaf = flow.leaf(found.bias) if flow.raw(found.bias) else None
        return (None if leaf is None else str(leaf.target)), node
    here = node
    while True:
        users = list(here.users)
        if len(users) != 1:
            return None, node
        user = users[0]
        if ops.name(user) == "add":
            addend = next((one for one in flow.operands(user) if one is not here), None)
            leaf = addend and flow.raw(addend) and flow.leaf(addend)
            if isinstance(leaf, fx.Node) and _bias_like(flow, leaf, found):
                return str(leaf.target), user
            return None, node
        if ops.name(user) not in ops.CAST | {"view", "reshape", "_unsafe_view"}:
            return None, node
        here = user


def _bias_like(flow: Flow, leaf: fx.Node, found: Contraction) -> bool:
    """A vector of the projection's width, or one such vector for each expert."""
    shape, weight = flow.shape(leaf), flow.shape(found.weight)
    wide = [weight[axis] for axis in found.outer]
    return list(shape) == wide or (len(shape) == 2 and len(weight) == 3 and list(shape[1:]) == wide)


def _bias_window(flow: Flow, bias: str, width: int, window: Columns | None) -> Columns | None:
    stored = int(flow.tensors[bias].shape[-1]) if bias in flow.tensors else width
    return window if window is not None and stored != width else None
