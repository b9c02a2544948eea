"""Attention cores: sdpa-like operators, and every softmax between a product q k^T and a product with v."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from torch import fx

from peftgraph.sites.dataflow import ops
from peftgraph.sites.dataflow.flow import Flow
from peftgraph.sites.dataflow.products import MixedTagger, Mixing, factors, is_product, mixing, spelled
from peftgraph.sites.dataflow.tags import along, varies
from peftgraph.sites.matchers.softmax import find_softmaxes
from peftgraph.sites.site import NearMiss

ROLE: Final = "attention.core"
CONDITIONS: Final = (
    "a softmax",
    "a product of two signals (q k^T) behind it",
    "a product of the result with a third value (v)",
    "a softmax along the axis of the keys",
    "operands that lead back to projections",
)


@dataclass(frozen=True, eq=False)
class Core:
    """softmax(q k^T + mask) v.

    `node`: the sdpa or softmax; `output`: the value after the product with v; `scores`: what the softmax is taken of.
    `features`: the axes of q, k and v that hold the features of one head; `positions`: the axis of k and of v along
    which the softmax weighs. `linear`: whether there is no softmax in fact; q (k^T v), or f(q k^T) v.
    """

    node: fx.Node
    q: fx.Node
    k: fx.Node
    v: fx.Node
    output: fx.Node
    mask: fx.Node | None
    products: tuple[fx.Node, ...] = ()
    scores: fx.Node | None = None
    features: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] = ((-1,), (-1,), (-1,))
    positions: tuple[int, int] = (-2, -2)
    linear: bool = False


def find_cores(flow: Flow, projected: set[fx.Node]) -> tuple[list[Core], list[NearMiss]]:
    """Return all attention cores in graph order, and the reason for every softmax that is none."""
    cores: list[Core] = []
    misses: list[NearMiss] = []
    softmaxes = find_softmaxes(flow)
    for node in flow.nodes:
        if ops.name(node) in ops.SDPA:
            cores.append(_fused(node))
        elif node in softmaxes:
            found = _from_softmax(flow, node, *softmaxes[node], projected)
            if isinstance(found, Core):
                cores.append(found)
            else:
                misses.append(found)
    return cores, misses


def _fused(node: fx.Node) -> Core:
    q, k, v = (ops.operand(node, i, name) for i, name in enumerate(("query", "key", "value")))
    assert q is not None, node
    assert k is not None, node
    assert v is not None, node
    mask = ops.operand(node, 3, "attn_mask")
    output = next((user for user in node.users if ops.name(user) == "getitem" and user.args[1] == 0), node)
    return Core(node, q, k, v, output if "flash" in ops.name(node) else node, mask)


def _from_softmax(
    flow: Flow, node: fx.Node, argument: fx.Node, axis: int | None, projected: set[fx.Node]
) -> Core | NearMiss:
    scores, mask, ends = _scores(flow, argument, projected)
    if not scores:
        shown = ", ".join(f"%{end.name} ({ops.name(end)})" for end in ends[:3]) or "constants only"
        return NearMiss.at(ROLE, node, CONDITIONS, 1, shown, *ends[:3])
    out = _weighting(flow, node, axis)
    if out is None:
        readers = ", ".join(f"%{user.name} ({ops.name(user)})" for user in list(node.users)[:3]) or "no reader"
        return NearMiss.at(ROLE, node, CONDITIONS, 2, readers, *scores, *list(node.users)[:3])
    main = scores[0]
    keyed = _keyed(flow, main, argument, axis)
    if keyed is None:
        found = f"no free axis of %{main.name} along which it runs"
        return NearMiss.at(ROLE, node, CONDITIONS, 3, found, main, out[0])
    return _written(flow, (node, argument, mask), tuple(scores), keyed, out)


def _written(
    flow: Flow,
    around: tuple[fx.Node, fx.Node, fx.Node | None],
    products: tuple[fx.Node, ...],
    keyed: tuple[int, int],
    out: tuple[fx.Node, int],
) -> Core:
    """Return the core of a softmax with its argument and mask. `keyed`: which factor of the scores is k, and its axis
    of positions; `out`: the product with v, and which factor v is."""
    sides, ends = factors(products[0]), factors(out[0])
    assert sides is not None, products[0]
    assert ends is not None, out[0]
    scored, valued, side = spelled(products[0]), spelled(out[0]), out[1]
    assert scored is not None, products[0]
    contracted = [tuple(scored.of(i).index(one) for one in scored.summed(i)) for i in (1 - keyed[0], keyed[0])]
    last = len(flow.shape(ends[side])) - 1
    features = (last,) if valued is None else tuple(valued.of(side).index(one) for one in valued.own(side))
    weighed = [] if valued is None else [valued.of(side).index(one) for one in valued.summed(side)]
    return Core(
        around[0],
        sides[1 - keyed[0]],
        sides[keyed[0]],
        ends[side],
        out[0],
        around[2],
        products,
        around[1],
        (contracted[0], contracted[1], features),
        (keyed[1], weighed[0] if len(weighed) == 1 else last - 1),
    )


def _scores(
    flow: Flow, argument: fx.Node, projected: set[fx.Node]
) -> tuple[list[fx.Node], fx.Node | None, list[fx.Node]]:
    """Return the products of two signals behind the argument, the added mask or bias, and what else was met."""
    through = ops.LAYOUT | ops.CAST | ops.SCALE | ops.MASKING | ops.DROPOUT
    found: list[fx.Node] = []
    ends: list[fx.Node] = []
    mask: fx.Node | None = None
    todo, seen = [argument], set[fx.Node]()
    while todo:
        node = todo.pop(0)
        if node in seen or not flow.floating(node):
            continue
        seen.add(node)
        if (mixed := _mixed_heads(flow, node, projected)) is not None:
            todo.append(mixed.value)
        elif is_product(flow, node):
            found.append(node)
        elif node in projected or node.op != "call_function" or ops.name(node) not in through:
            ends.append(node)
        else:
            addends = flow.operands(node)
            if mask is None and len(addends) == 2 and ops.name(node) in ("add", "where", "masked_fill"):
                mask = _mask_side(flow, node, addends)
            todo.extend(addends)
    return found, mask, ends


def _mixed_heads(flow: Flow, node: fx.Node, projected: set[fx.Node]) -> Mixing | None:
    """Return the scores whose heads a node mixes by weights of the model (talking-heads attention, arXiv 2003.02436);
    None where it is no such node: what it sums over must be an axis that both factors of the scores have."""
    mixed = mixing(flow, node)
    products = [] if mixed is None else _scores(flow, mixed.value, projected)[0]
    named = spelled(products[0]) if products else None
    if mixed is None or named is None:
        return None
    common = [named.result.index(one) for one in named.result if one in named.left and one in named.right]
    if not common:
        return None
    tags = MixedTagger(flow, {products[0]: along(flow.shape(products[0]), common)}).run(mixed.value)
    arrived = tags.shape == flow.shape(mixed.value)
    return mixed if arrived and all(varies(tags, axis) for axis in mixed.summed) else None


def _mask_side(flow: Flow, node: fx.Node, addends: list[fx.Node]) -> fx.Node | None:
    if ops.name(node) != "add":
        return next((one for one in addends if not flow.floating(one)), None)
    plain = [one for one in addends if not any(is_product(flow, a) for a in _chain(flow, one))]
    return plain[0] if len(plain) == 1 else None


def _chain(flow: Flow, node: fx.Node) -> list[fx.Node]:
    """Return a node and what it passes on, up to the first product."""
    chain = [node]
    while not is_product(flow, chain[-1]) and ops.name(chain[-1]) in ops.MASKING | ops.SCALE | ops.LAYOUT | ops.CAST:
        operands = [one for one in flow.operands(chain[-1]) if flow.signal(one)]
        if not operands:
            break
        chain.append(operands[0])
    return chain


def _weighting(flow: Flow, node: fx.Node, axis: int | None) -> tuple[fx.Node, int] | None:
    """Forward from the softmax to the product with v: the product, and which of its factors v is."""
    through = ops.LAYOUT | ops.CAST | ops.SCALE | ops.DROPOUT | {"masked_fill", "where", "nan_to_num"}
    todo, seen = [node], set[fx.Node]()
    while todo:
        here = todo.pop(0)
        for user in here.users:
            over_heads = _spares_keys(flow, node, axis, user)
            sides = None if over_heads else factors(user)
            if sides is not None and is_product(flow, user):
                return user, 1 if sides[0] is here else 0
            mixed = ops.name(user) == "add" and flow.shape(user) == flow.shape(node)  # with weights by position
            if user not in seen and (over_heads or mixed or ops.name(user) in through):
                seen.add(user)
                todo.append(user)
    return None


def _spares_keys(flow: Flow, softmax: fx.Node, axis: int | None, node: fx.Node) -> bool:
    """Tell whether a node behind a softmax mixes or normalises no other axes than those of heads: neither the axis of
    the softmax nor features of v."""
    shape = flow.shape(softmax)
    if axis is None or len(shape) < 3:
        return False
    found = mixing(flow, node)
    value, across = (None, ()) if found is None else (found.value, found.summed)
    if ops.name(node) in ops.NORM:
        value, across = flow.operands(node)[0], _normalised(flow, node)
    if value is None:
        return False
    tags = MixedTagger(flow, {softmax: along(shape, (axis,))}).run(value)
    return (
        tags.shape == flow.shape(value)
        and bool((tags != 0).all())
        and not any(varies(tags, one % tags.dim()) for one in across)
    )


def _normalised(flow: Flow, node: fx.Node) -> tuple[int, ...]:
    """Return the axes of which a norm's statistics are made, without positions of an image that it keeps apart."""
    if ops.name(node) in ops.IMAGE_NORM:
        return (1,)
    sizes = ops.argument(node, 1, "normalized_shape")
    return tuple(-1 - i for i in range(len(sizes))) if isinstance(sizes, list | tuple) else (-1,)


def _keyed(flow: Flow, product: fx.Node, argument: fx.Node, dim: int | None) -> tuple[int, int] | None:
    """Return which factor of the scores is k, and its axis of positions: the factor with an axis that becomes the
    softmax's, found by tagging its indices."""
    named, shape = spelled(product), flow.shape(product)
    if named is None or dim is None:
        return None
    for side in (1, 0):
        for letter in named.own(side):
            tags = MixedTagger(flow, {product: along(shape, (named.result.index(letter),))}).run(argument)
            if tags.dim() == len(flow.shape(argument)) and varies(tags, dim):
                return side, named.of(side).index(letter)
    return None
