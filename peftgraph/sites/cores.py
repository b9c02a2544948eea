"""Attention cores: sdpa-like operators, and every softmax between a product q k^T and a product with v."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import fx

from . import ops
from .einsum import letters, operands
from .flow import Flow
from .site import NearMiss
from .softmax import find_softmaxes
from .tags import Tagger, Tags, along, varies

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
    """softmax(q k^T + mask) v. `node`: the sdpa or softmax; `output`: the value after the product with v."""

    node: fx.Node
    q: fx.Node
    k: fx.Node
    v: fx.Node
    output: fx.Node
    mask: fx.Node | None
    products: tuple[fx.Node, ...] = ()


def is_product(flow: Flow, node: fx.Node) -> bool:
    """A contraction of two signals."""
    sides = factors(node)
    return sides is not None and all(flow.signal(one) for one in sides)


def factors(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    kind = ops.name(node)
    inputs = operands(node) if kind == "einsum" else [one for one in node.args if isinstance(one, fx.Node)]
    if kind == "baddbmm":
        inputs = inputs[1:]
    if kind not in ("matmul", "bmm", "mm", "baddbmm", "einsum") or len(inputs) != 2:
        return None
    return inputs[0], inputs[1]


def find_cores(flow: Flow, projected: set[fx.Node]) -> tuple[list[Core], list[NearMiss]]:
    """All attention cores in graph order, and for every softmax that is none the reason."""
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
    out = _weighting(flow, node)
    if out is None:
        readers = ", ".join(f"%{user.name} ({ops.name(user)})" for user in list(node.users)[:3]) or "no reader"
        return NearMiss.at(ROLE, node, CONDITIONS, 2, readers, *scores, *list(node.users)[:3])
    main = scores[0]
    sides = _query_first(flow, main, argument, axis)
    if sides is None:
        found = f"no free axis of %{main.name} along which it runs"
        return NearMiss.at(ROLE, node, CONDITIONS, 3, found, main, out[0])
    product, v = out
    return Core(node, sides[0], sides[1], v, product, mask, tuple(scores))


def _scores(
    flow: Flow, argument: fx.Node, projected: set[fx.Node]
) -> tuple[list[fx.Node], fx.Node | None, list[fx.Node]]:
    """The products of two signals behind the argument, the added mask or bias, and what else was met."""
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
        if is_product(flow, node):
            found.append(node)
        elif (mixed := _mixed_heads(flow, node)) is not None:
            todo.append(mixed)
        elif node in projected or node.op != "call_function" or ops.name(node) not in through:
            ends.append(node)
        else:
            addends = flow.operands(node)
            if mask is None and len(addends) == 2 and ops.name(node) in ("add", "where", "masked_fill"):
                mask = _mask_side(flow, node, addends)
            todo.extend(addends)
    return found, mask, ends


def _mixed_heads(flow: Flow, node: fx.Node) -> fx.Node | None:
    """The scores that a projection over heads mixes (talking-heads attention, arXiv 2003.02436); None where `node`
    is none: what it contracts must be an axis that both factors of the scores have."""
    if ops.name(node) != "linear" or not flow.raw(flow.operands(node)[1]):
        return None
    mixed = flow.operands(node)[0]
    product = flow.strip(mixed)
    axes = free_axes(flow, product) if is_product(flow, product) else None
    if axes is None:
        return None
    shape = flow.shape(product)
    free = {axis % len(shape) for axis in axes}
    common = [axis for axis in range(1, len(shape)) if axis not in free]
    tags = Tagger(flow, {product: along(shape, common)}).run(mixed) if common else None
    return mixed if tags is not None and tags.shape == flow.shape(mixed) and varies(tags, tags.dim() - 1) else None


def _mask_side(flow: Flow, node: fx.Node, addends: list[fx.Node]) -> fx.Node | None:
    if ops.name(node) != "add":
        return next((one for one in addends if not flow.floating(one)), None)
    plain = [one for one in addends if not any(is_product(flow, a) for a in _chain(flow, one))]
    return plain[0] if len(plain) == 1 else None


def _chain(flow: Flow, node: fx.Node) -> list[fx.Node]:
    """A node and what it passes on, up to the first product."""
    chain = [node]
    while not is_product(flow, chain[-1]) and ops.name(chain[-1]) in ops.MASKING | ops.SCALE | ops.LAYOUT | ops.CAST:
        operands = [one for one in flow.operands(chain[-1]) if flow.signal(one)]
        if not operands:
            break
        chain.append(operands[0])
    return chain


def _weighting(flow: Flow, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Forward from the softmax to the product with v: (the product, v)."""
    through = ops.LAYOUT | ops.CAST | ops.SCALE | ops.DROPOUT | {"masked_fill", "where", "nan_to_num"}
    todo, seen = [node], set[fx.Node]()
    while todo:
        here = todo.pop(0)
        for user in here.users:
            sides = factors(user)
            if sides is not None and is_product(flow, user):
                return user, sides[1] if sides[0] is here else sides[0]
            over_heads = ops.name(user) == "linear" and _spares_keys(flow, node, user)
            mixed = ops.name(user) == "add" and flow.shape(user) == flow.shape(node)  # with weights by position
            if user not in seen and (over_heads or mixed or ops.name(user) in through):
                seen.add(user)
                todo.append(user)
    return None


def _spares_keys(flow: Flow, softmax: fx.Node, linear: fx.Node) -> bool:
    """Does a linear behind a softmax contract another axis than the softmax's, and no features of v either?"""
    here = flow.operands(linear)[0]
    dim, shape = ops.argument(softmax, 1, "dim"), flow.shape(softmax)
    if not flow.raw(flow.operands(linear)[1]) or not isinstance(dim, int) or len(shape) < 4:
        return False
    tags = Tagger(flow, {softmax: along(shape, (dim,))}).run(here)
    return tags.shape == flow.shape(here) and bool((tags != 0).all()) and not varies(tags, tags.dim() - 1)


def free_axes(flow: Flow, product: fx.Node) -> tuple[int, int] | None:
    """The axes of a product that only its first, only its second factor has."""
    if ops.name(product) != "einsum":
        return -2, -1
    named = letters(product)
    if named is None or len(named[0]) != 2:
        return None
    (left, right), result = named
    first = [i for i, letter in enumerate(result) if letter in left and letter not in right]
    second = [i for i, letter in enumerate(result) if letter in right and letter not in left]
    return (first[0], second[0]) if len(first) == 1 and len(second) == 1 else None


def _run(flow: Flow, product: fx.Node, seed: Tags, argument: fx.Node) -> Tags:
    """Tags from a product to the softmax's argument, past a projection over heads, which keeps the other axes."""
    for node in flow.nodes[flow.order[product] : flow.order[argument]]:
        mixed = _mixed_heads(flow, node) if flow.descends(node, product) and flow.descends(argument, node) else None
        if mixed is not None:
            tags = Tagger(flow, {product: seed}).run(mixed)
            return Tagger(flow, {node: tags[..., :1].expand(flow.shape(node))}).run(argument)
    return Tagger(flow, {product: seed}).run(argument)


def _query_first(flow: Flow, product: fx.Node, argument: fx.Node, dim: int | None) -> tuple[fx.Node, fx.Node] | None:
    """(q, k): k is the factor whose free axis is the softmax axis, found by running an index along it."""
    sides, axes = factors(product), free_axes(flow, product)
    if sides is None or axes is None or dim is None:
        return None
    shape = flow.shape(product)
    for q, k, axis in ((sides[0], sides[1], axes[1]), (sides[1], sides[0], axes[0])):
        spread = [1] * len(shape)
        spread[axis] = shape[axis]
        seed = torch.arange(1, shape[axis] + 1).reshape(spread).expand(shape)
        tags = _run(flow, product, seed, argument)
        if tags.dim() == len(flow.shape(argument)) and varies(tags, dim):
            return q, k
    return None
