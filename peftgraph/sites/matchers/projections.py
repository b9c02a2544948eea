"""Projections: a signal contracted with a weight, in every spelling.

linear, addmm (Conv1D), matmul, einsum, 1x1 convolution and grouped_mm (experts) become one description: which node,
which operand, which axes of the result are its features, and where the weight and the bias are stored. What has its
features on other axes than the last is described by the letters of its indices as well.
"""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from peftgraph.sites.dataflow import ops
from peftgraph.sites.dataflow.einsum import letters, operands
from peftgraph.sites.dataflow.flow import Flow
from peftgraph.sites.dataflow.tags import Tagger, along, in_order, squeeze_constant, varies
from peftgraph.sites.site import Bias, Columns, Equation, Form, MatrixAxes, Weight


@dataclass(frozen=True, eq=False)
class Projection:
    """y = x W^T + b.

    Attributes:
        node: the product.
        input, output: x, and y with its bias.
        weight, bias: where they are stored.
        axes: the axes of the result that are features, in the order in which the weight has them.
        width: how many features these are.
        expert: the number of the expert whose weight is cut out of a stack.
        offsets: where each expert's rows end (grouped_mm).
        chosen: the expert of each row (gathered weights).
        input_axis: the axis of x that is contracted; of several, the first.
        equation: the letters of the product, where features are on other axes than the last.
        form: where a change of the weight can enter.
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
    equation: Equation | None = None
    form: Form = "output"


@dataclass(frozen=True)
class Contraction:
    """Operands of a product.

    Attributes:
        x, weight: the operands.
        inner, outer: the axes of the weight operand that are contracted, and that become features.
        axes: the axes of the result that are features, in the order of `outer`.
        letters: of x, of the weight operand and of the result, where features are on other axes than the last.
        form: where a change of the weight can enter.
    """

    x: fx.Node
    weight: fx.Node
    inner: tuple[int, ...]
    outer: tuple[int, ...]
    axes: tuple[int, ...]
    bias: fx.Node | None = None
    offsets: fx.Node | None = None
    input_axis: int = -1
    letters: tuple[str, str, str] | None = None
    form: Form = "output"


def projection(flow: Flow, node: fx.Node) -> Projection | None:
    """Return the projection that `node` computes; None where it computes something else."""
    found = contraction(flow, node)
    if found is None or not (flow.signal(found.x) or ops.name(node) == "linear"):  # a learned query is projected too
        return None
    place = store(flow, found)
    if place is None:
        return None
    weight = place.weight
    shape = flow.shape(node)
    width = 1
    for axis in found.axes:
        width *= shape[axis]
    bias, output = _bias(flow, node, found)
    window = weight.window if place.expert is None else None
    chosen = None if weight.computed else flow.picks(found.weight)
    return Projection(
        node=node,
        input=found.x,
        output=output,
        weight=weight,
        bias=None if bias is None else Bias(bias, _bias_window(flow, bias, width, window)),
        axes=found.axes,
        width=width,
        expert=place.expert,
        offsets=found.offsets,
        chosen=chosen,
        input_axis=found.input_axis,
        equation=_equation(flow, found, weight) if chosen is None else None,
        form=found.form if place.in_order else "weight",
    )


def _equation(flow: Flow, found: Contraction, stored: Weight) -> Equation | None:
    """Return the letters of a product, with the weight's own in the order in which its matrix has them. Axes along
    which one matrix is repeated, as for every head and row of a batch, are no axes of its own."""
    if found.letters is None:
        return None
    x, weight, result = found.letters
    rank = len(weight)
    outer = "".join(weight[axis % rank] for axis in found.outer)
    inner = "".join(weight[axis % rank] for axis in found.inner)
    several = stored.experts is not None or (stored.axes is not None and stored.axes.stacked)
    stacked = "".join(letter for letter in weight if several and letter not in outer + inner)
    sizes = tuple(zip(weight, flow.shape(found.weight), strict=True))
    return Equation(x, stacked, outer, inner, result, sizes)


def contraction(flow: Flow, node: fx.Node) -> Contraction | None:
    """Return the product of a signal and a weight in `node`."""
    kind = ops.name(node)
    inputs = [one for one in node.args if isinstance(one, fx.Node)]
    if kind == "linear" and (flow.raw(inputs[1]) or flow.parametrised(inputs[1])):
        return Contraction(inputs[0], inputs[1], (-1,), (-2,), (-1,), bias=ops.operand(node, 2, "bias"))
    if kind in ("conv1d", "conv2d", "conv3d"):
        return _pointwise(flow, node, inputs)
    if kind in ("addmm", "baddbmm") and len(inputs) > 2 and flow.raw(inputs[2]):
        return Contraction(inputs[1], inputs[2], (-2,), (-1,), (-1,), bias=inputs[0])
    if kind in ("mm", "matmul", "bmm") and flow.raw(inputs[1]) and len(flow.shape(inputs[1])) > 1:
        return Contraction(inputs[0], inputs[1], (-2,), (-1,), (-1,))
    if kind in ("mm", "matmul", "bmm") and flow.raw(inputs[0]) and len(flow.shape(inputs[0])) > 1:
        return _from_the_left(flow, inputs[0], inputs[1])
    if kind in ops.GROUPED and flow.raw(inputs[1]):
        return Contraction(inputs[0], inputs[1], (-2,), (-1,), (-1,), offsets=ops.operand(node, 2, "offs"))
    return _einsum(flow, node) if kind == "einsum" else None


def _from_the_left(flow: Flow, weight: fx.Node, x: fx.Node) -> Contraction | None:
    """W x: the features are on the axis before the last; on the last of a vector."""
    of_weight, of_x = flow.shape(weight), flow.shape(x)
    if len(of_x) == 1:
        return Contraction(x, weight, (-1,), (-2,), (-1,), input_axis=-1)
    stack = string.ascii_uppercase[: len(of_weight) - 2]
    free = string.ascii_uppercase[len(stack) : len(stack) + len(of_x) - 2 - len(stack)]
    letters = (f"{free}{stack}if", f"{stack}oi", f"{free}{stack}of")
    spelled = len(of_x) >= len(of_weight) and of_x[len(free) : -2] == of_weight[:-2]
    return Contraction(
        x,
        weight,
        (-1,),
        (-2,),
        (-2,),
        input_axis=-2,
        letters=letters if spelled else None,
        form="output" if spelled else "weight",
    )


def _einsum(flow: Flow, node: fx.Node) -> Contraction | None:
    inputs, named = operands(node), letters(node)
    if named is None or len(inputs) != 2 or flow.raw(inputs[0]) == flow.raw(inputs[1]):
        return None
    side = 0 if flow.raw(inputs[0]) else 1
    weight, other, result = named[0][side], named[0][1 - side], named[1]
    outer = [letter for letter in weight if letter in result and letter not in other]
    inner = [letter for letter in weight if letter in other and letter not in result]
    stacked = [letter for letter in weight if letter in other and letter in result]
    if not outer or not inner or len({*weight}) != len(weight) or len(outer + inner + stacked) != len(weight):
        return None  # no matrix: a diagonal, or an axis of the weight alone that is summed over
    last = len(inner) == len(outer) == 1 and not stacked and other[-1] == inner[0] and result[-1] == outer[0]
    return Contraction(
        inputs[1 - side],
        inputs[side],
        tuple(weight.index(letter) for letter in inner),
        tuple(weight.index(letter) for letter in outer),
        tuple(result.index(letter) for letter in outer),
        input_axis=other.index(inner[0]) - len(other),
        letters=None if last and result == other[:-1] + outer[0] else (other, weight, result),
    )


def _pointwise(flow: Flow, node: fx.Node, inputs: list[fx.Node]) -> Contraction | None:
    """Return a convolution whose kernel is one point and that does not group channels is a projection."""
    shape = flow.shape(inputs[1])
    groups = ops.argument(node, 6, "groups")
    weight = flow.raw(inputs[1]) or flow.parametrised(inputs[1])
    if not weight or any(size != 1 for size in shape[2:]) or groups not in (None, 1):
        return None
    channel = 1 - len(shape)
    return Contraction(
        inputs[0], inputs[1], (1,), (0,), (channel,), bias=ops.operand(node, 2, "bias"), input_axis=channel
    )


@dataclass(frozen=True)
class Place:
    """Where a weight operand is stored.

    Attributes:
        weight: the stored parameter.
        expert: the number of the expert that is cut out of it.
        in_order: whether the operand has its features in the order in which they are stored, so that what is
            computed from the stored tensor's own axes fits the product.
    """

    weight: Weight
    expert: int | None = None
    in_order: bool = True


def store(flow: Flow, found: Contraction) -> Place | None:
    """Return where the weight operand is stored, by running its path on index tensors; and the expert it picks."""
    rank = len(flow.shape(found.weight))
    if flow.parametrised(found.weight):
        leaf = flow.parametrised_leaf(found.weight)
        if leaf is None:
            return None
        return Place(replace(_direct(leaf, flow.shape(leaf), found, rank), computed=found.weight.name))
    leaf = flow.leaf(found.weight)
    if leaf is None:
        return None
    sizes = flow.shape(leaf)
    if len(sizes) < 2:
        return None
    if leaf is found.weight or _plain(flow, found.weight):
        weight = _direct(leaf, sizes, found, rank)
        rearranged = weight.experts is None and flow.picks(found.weight) is not None
        return None if rearranged else Place(weight)  # an index into features has them in another order
    return _traced(flow, found, leaf, sizes, rank)


def _plain(flow: Flow, node: fx.Node) -> bool:
    """Tell whether only casts, or the selection of whole experts by index, are between the stored parameter and its
    use."""
    node = flow.uncast(node)
    if ops.name(node) in ("index", "index_select") and flow.picks(node) is not None:
        node = flow.uncast(flow.operands(node)[0])
    return node.op == "get_attr"


def _direct(leaf: fx.Node, sizes: tuple[int, ...], found: Contraction, rank: int) -> Weight:
    """Return the stored axes are the operand's own; behind the choice of experts by index, the first is theirs."""
    inner, outer = (tuple(axis % rank for axis in axes) for axes in (found.inner, found.outer))
    return _weight(leaf, sizes, outer, inner)


def _weight(
    leaf: fx.Node, sizes: Sequence[int], outer: tuple[int, ...], inner: tuple[int, ...], window: Columns | None = None
) -> Weight:
    """Return a weight by the roles of its stored axes; those without one that are longer than 1 count experts."""
    transposed = min(inner) < min(outer)
    stacked = tuple(axis for axis in range(len(sizes)) if axis not in (*inner, *outer) and sizes[axis] > 1)
    if not stacked and 0 not in (*inner, *outer):
        stacked = (0,)
    single = tuple(axis for axis in range(len(sizes)) if axis not in (*inner, *outer, *stacked))
    experts = math.prod(sizes[axis] for axis in stacked) if stacked else None
    axes = MatrixAxes(tuple(sizes), stacked, outer, (*inner, *single))
    plain = axes.order == MatrixAxes.plain(sizes, transposed, experts).order and len(stacked) < 2
    return Weight(str(leaf.target), transposed, window, experts, None if plain else axes)


def _traced(flow: Flow, found: Contraction, leaf: fx.Node, sizes: tuple[int, ...], rank: int) -> Place | None:
    """Seed the stored parameter along each of its axes and see which axis of the operand varies."""
    outer: list[tuple[int, torch.Tensor]] = []
    inner: list[int] = []
    expert: int | None = None
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
        elif squeeze_constant(tags).dim() == 0 and not flow.picks(found.weight):
            expert = int(squeeze_constant(tags).item()) - 1
    if not outer or not inner:
        return None
    window = None
    if len(outer) == 1 and not torch.equal(outer[0][1], torch.arange(1, sizes[outer[0][0]] + 1)):
        window = Columns.from_indices(outer[0][1] - 1)
    weight = _weight(leaf, sizes, tuple(axis for axis, _ in outer), tuple(inner), window)
    counted = _counts(flow, found, leaf, sizes, inner) and (
        window is not None or _counts(flow, found, leaf, sizes, [axis for axis, _ in outer])
    )
    return Place(weight, expert, counted or flow.picks(found.weight) is not None)


def _counts(flow: Flow, found: Contraction, leaf: fx.Node, sizes: tuple[int, ...], axes: Sequence[int]) -> bool:
    """Tell whether all features along some stored axes arrive at the operand, in their order."""
    tags = squeeze_constant(Tagger(flow, {leaf: along(sizes, axes)}).run(found.weight)).flatten()
    return torch.equal(tags, torch.arange(1, math.prod(sizes[axis] for axis in axes) + 1))


def _only(tags: torch.Tensor, axes: set[int]) -> torch.Tensor | None:
    """Return the tags along `axes` if they vary there and nowhere else."""
    for axis in range(tags.dim()):
        if varies(tags, axis) and axis not in axes:
            return None
    kept = squeeze_constant(tags)
    return kept if kept.dim() > 0 else None


def _bias(flow: Flow, node: fx.Node, found: Contraction) -> tuple[str | None, fx.Node]:
    """Return the bias added by the operator itself or right after it, and the node that holds the biased value."""
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
    """Tell whether it is a vector of the projection's width, or one such vector for each expert."""
    shape, weight = flow.shape(leaf), flow.shape(found.weight)
    wide = [weight[axis] for axis in found.outer]
    return list(shape) == wide or (len(shape) == 2 and len(weight) == 3 and list(shape[1:]) == wide)


def _bias_window(flow: Flow, bias: str, width: int, window: Columns | None) -> Columns | None:
    stored = int(flow.tensors[bias].shape[-1]) if bias in flow.tensors else width
    return window if window is not None and stored != width else None
