"""Sites that are seen at a glance: embeddings, convolutions, every other stored matrix, and every bias vector."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set

from torch import fx

from peftgraph.sites.assign.blocks import Place
from peftgraph.sites.assign.collect import Collection, Ports, owner
from peftgraph.sites.dataflow import ops
from peftgraph.sites.site import Bias, Form, MatrixAxes, Weight


def add_embeddings(into: Collection) -> None:
    for node in into.flow.nodes:
        if ops.name(node) not in ("embedding", "embedding_bag") or not _looks_up_input(into.flow.operands(node)[1]):
            continue
        leaf = into.flow.leaf(into.flow.operands(node)[0])
        if leaf is not None:
            _embedding(into, node, str(leaf.target), into.flow.operands(node)[1])


def _embedding(into: Collection, node: fx.Node, parameter: str, index: fx.Node) -> None:
    weight = Weight(parameter, transposed=True)
    bag = ops.name(node) == "embedding_bag"  # it sums what it looks up, and gives several values
    ports: Ports = {"input": index, "output": None if bag else node}
    shape = weight.shape(into.flow.tensors)
    form: Form = "weight" if bag else "output"
    stack = _fed_by(into, node)
    into.add("embedding", node, owner(parameter), None, ports, weight=weight, shape=shape, stack=stack, form=form)


def _fed_by(into: Collection, node: fx.Node) -> str | None:
    """The first stack whose stream starts from what `node` gives."""
    order = into.flow.order
    places = sorted(into.blocks.places.items(), key=lambda item: order[item[0].node])
    return next((place.stack for join, place in places if into.flow.descends(join.root, node)), None)


def add_weights(into: Collection, parameters: Set[str]) -> None:
    """Every stored matrix that is no part of another site: kernels of convolutions, and what other operators read."""
    flow = into.flow
    for node in flow.nodes:
        if ops.name(node) in ops.CONV and node not in into.anatomy.projection_at:
            _convolution(into, node)
    taken = {name for names in into.stored.values() for name in names}
    for leaf in flow.nodes:
        name = str(leaf.target)
        known = leaf.op == "get_attr" and name in parameters and name not in taken and leaf.users
        if known and flow.floating(leaf) and sum(size > 1 for size in flow.shape(leaf)) > 1:
            reader = min(leaf.users, key=flow.order.__getitem__)
            weight = Weight(name, axes=_behind_ones(flow.shape(leaf)))
            path = owner(name) if name.endswith(".weight") else name
            place, shape = into.place(reader), weight.shape(flow.tensors)
            into.add("matrix", reader, path, place, {}, weight=weight, shape=shape, form="weight")


def _behind_ones(shape: Sequence[int]) -> MatrixAxes | None:
    """The axes of a matrix that is stored behind axes of size 1, as a table of positions (1, length, width) is."""
    sizes = tuple(int(size) for size in shape)
    ones = next(i for i, size in enumerate(sizes) if size > 1)
    outer = tuple(range(ones + 1))
    return MatrixAxes(sizes, (), outer, tuple(range(ones + 1, len(sizes)))) if ones else None


def _convolution(into: Collection, node: fx.Node) -> None:
    """A site for a convolution of any kernel, stride and dilation, transposed or not, with any number of groups."""
    flow = into.flow
    image, kernel = flow.operands(node)[:2]
    computed = flow.parametrised(kernel)
    leaf = flow.parametrised_leaf(kernel) if computed else flow.uncast(kernel) if flow.raw(kernel) else None
    if leaf is None or leaf.op != "get_attr":
        return
    sizes, turned = flow.shape(leaf), "transpose" in ops.name(node)
    groups = ops.argument(node, 6, "groups")
    grouped = groups if isinstance(groups, int) else 1
    spatial = tuple(range(2, len(sizes)))
    if not turned:
        axes = None
    elif grouped == 1:
        axes = MatrixAxes(sizes, (), (1,), (0, *spatial))
    else:  # stored (in, out / groups, ...): each group of inputs has outputs of its own
        split = (grouped, sizes[0] // grouped, *sizes[1:])
        axes = MatrixAxes(split, (), (0, 2), (1, *(axis + 1 for axis in spatial)))
    weight = Weight(str(leaf.target), axes=axes, computed=kernel.name if computed else None)
    bias = ops.operand(node, 2, "bias")
    stored = bias and flow.leaf(bias)
    into.place_of[node] = into.place(node)
    into.add(
        "conv",
        node,
        owner(weight.parameter),
        into.place(node),
        {"input": image, "output": node},
        weight=weight,
        bias=None if stored is None else Bias(str(stored.target)),
        feature_axis=1 - len(sizes),
        form="output" if grouped == 1 else "weight",
        shape=weight.shape(flow.tensors),
    )


def add_biases(into: Collection) -> None:
    """Every additive bias vector, at every use."""
    for parameter, op, output, place in _bias_uses(into):
        shape = tuple(int(size) for size in into.flow.tensors[parameter].shape)
        into.add("bias", op, parameter, place, {"output": output}, bias=Bias(parameter), shape=shape)


def _bias_uses(into: Collection) -> Iterable[tuple[str, fx.Node, fx.Node, Place | None]]:
    flow, seen = into.flow, set[fx.Node]()
    for one in into.anatomy.projections:
        seen |= {one.node, one.output}
        if one.bias is not None:
            yield one.bias.parameter, one.node, one.output, into.place_of.get(one.node)
    for norm in into.anatomy.norms:
        seen |= {norm.node, norm.output}
        if norm.bias is not None:
            yield norm.bias, norm.node, norm.output, into.place_of.get(norm.node)
    for node in flow.nodes:
        vector = None
        if ops.name(node) in ops.CONV:
            vector = ops.operand(node, 2, "bias")
        elif ops.name(node) == "add" and not flow.constant(node):  # a gain of 1 + w is no bias
            vector = next((one for one in flow.operands(node) if flow.raw(one)), None)
        leaf = None if vector is None else flow.leaf(vector)
        if node not in seen and leaf is not None and flow.floating(leaf) and len(flow.shape(leaf)) == 1:
            yield str(leaf.target), node, node, into.place(node)


def _looks_up_input(index: fx.Node) -> bool:
    """An index that is an input, up to layout, casts and masking; positions, counted or given, are none."""
    through = ops.LAYOUT | ops.CAST | {"masked_fill", "where", "clamp", "copy", "new_zeros", "fill", "clamp_min"}
    todo, seen = [index], set[fx.Node]()
    while todo:
        node = todo.pop()
        if node.op == "placeholder":
            return not node.meta.get("fill")
        if node not in seen and ops.name(node) in through:
            seen.add(node)
            todo.extend(node.all_input_nodes if ops.name(node) != "where" else node.all_input_nodes[1:])
    return False
