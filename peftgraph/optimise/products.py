"""Joins products: a sum of products accumulates in one place, small products of one value are one product.

These rewrites change the order in which numbers are added, and so the last bits of a result.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from peftgraph.optimise.clean_up import VIEWS, call, hint, remove_unused, same_sizes, share_equal_nodes, value_of

aten = torch.ops.aten
NARROW = 4  # a product is small if its result is at most this fraction of its operand


def join_products(graph: fx.Graph) -> None:
    """Rewrite all products of a joint graph, in place."""
    scale_small_values(graph)
    accumulate_products(graph)
    stack_small_products(graph)
    stack_small_gradients(graph)
    transpose_narrow_gradients(graph)
    stack_accumulated_products(graph)
    share_equal_nodes(graph)
    remove_unused(graph)


def scale_small_values(graph: fx.Graph) -> None:
    """Multiply the result of a product by a number, in place of its larger operand."""
    for node in list(graph.nodes):
        if node.target is not aten.mul.Tensor or not _is_number(node.args[1]):
            continue
        for product, path in _products_that_read(node):
            if _numel(product) < _numel(node):
                _scale_after(graph, node, product, path)
    remove_unused(graph)


def _scale_after(graph: fx.Graph, scaled: fx.Node, product: fx.Node, path: list[fx.Node]) -> None:
    """Let a product read what `scaled` reads, through the same views, and scale its result."""
    with graph.inserting_before(product):
        value: Any = scaled.args[0]
        for step in path:
            value = call(graph, step.target, value, *step.args[1:])
        last = path[-1] if path else scaled
        operands = [value if one is last else one for one in product.args]
        new = call(graph, aten.mul.Tensor, call(graph, product.target, *operands), scaled.args[1])
    product.replace_all_uses_with(new)
    graph.erase_node(product)


def _products_that_read(node: fx.Node, path: tuple[fx.Node, ...] = ()) -> list[tuple[fx.Node, list[fx.Node]]]:
    """Return the products that read a value through views and transposes, each with those steps."""
    found: list[tuple[fx.Node, list[fx.Node]]] = []
    for user in list(node.users):
        if user.target is aten.mm.default and user.args[0] is not user.args[1]:
            found.append((user, list(path)))
        elif user.target in VIEWS or user.target is aten.t.default:
            found += _products_that_read(user, (*path, user))
    return found


@dataclass(frozen=True)
class _Term:
    """A product in a sum, times a number.

    Attributes:
        sizes: of the view in which the sum reads it; None if it reads the matrix itself.
    """

    left: Any
    right: Any
    factor: float
    sizes: Any = None


def accumulate_products(graph: fx.Graph) -> None:
    """Turn, in place, each sum of a value and a product that nothing else reads into a product that is added to it."""
    for node in list(graph.nodes):
        if node.target is not aten.add.Tensor or node.kwargs or not all(isinstance(one, fx.Node) for one in node.args):
            continue
        pair: Any = node.args
        for rest, added in (pair, pair[::-1]):
            term = _term(added)
            if term is not None and rest is not added and _is_like(rest, node) and _is_like(added, node):
                _accumulate(graph, node, rest, term)
                break
    remove_unused(graph)


def _accumulate(graph: fx.Graph, node: fx.Node, rest: fx.Node, term: _Term) -> None:
    """Replace a sum by the product added to its other operand."""
    with graph.inserting_before(node):
        flat = rest if term.sizes is None else as_matrix(graph, rest)
        scale = {} if term.factor == 1.0 else {"alpha": term.factor}
        total = call(graph, aten.addmm.default, flat, term.left, term.right, **scale)
        result = total if term.sizes is None else call(graph, aten.view.default, total, term.sizes)
    node.replace_all_uses_with(result)
    graph.erase_node(node)


def _term(node: fx.Node) -> _Term | None:
    """Return the product that a value is, perhaps times a number, if nothing else reads it."""
    factor: Any = 1.0
    sizes: Any = None
    while len(node.users) == 1:
        if node.target is aten.mm.default:
            return _Term(node.args[0], node.args[1], factor, sizes)
        if node.target in VIEWS:
            sizes = sizes if sizes is not None else node.args[1]
        elif node.target is aten.mul.Tensor and _is_number(node.args[1]):
            factor *= node.args[1]
        else:
            return None
        node = node.args[0]  # pyright: ignore[reportAssignmentType]
    return None


def _is_like(value: fx.Node, total: fx.Node) -> bool:
    """Return True if an operand is dense, and of the shape and dtype of the sum."""
    one, all_ = value_of(value), value_of(total)
    return one.dtype == all_.dtype and same_sizes(one.shape, all_.shape) and one.is_contiguous()


def as_matrix(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """Return a dense value as a matrix with its last axis."""
    source = node.args[0] if node.target in VIEWS else node
    if (
        isinstance(source, fx.Node)
        and value_of(source).dim() == 2
        and value_of(source).shape[1] == value_of(node).shape[-1]
    ):
        return source
    return call(graph, aten.view.default, node, [-1, value_of(node).shape[-1]])


def stack_small_products(graph: fx.Graph) -> None:
    """Compute, in place, the small products of one value with several stored matrices as one product."""
    siblings: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        if node.target is aten.mm.default and _is_small(node) and _stored(node.args[1]) is not None:
            siblings[node.args[0]].append(node)
    for value, products in siblings.items():
        if len(products) > 1 and len({value_of(one).dtype for one in products}) == 1:
            _stack(graph, value, products)


def _stack(graph: fx.Graph, value: fx.Node, products: list[fx.Node]) -> None:
    with graph.inserting_before(products[0]):
        stacked = call(graph, aten.cat.default, [_stored(one.args[1]) for one in products], 0)
        total = call(graph, aten.mm.default, value, call(graph, aten.t.default, stacked))
        start = 0
        for one in products:
            width = value_of(one).shape[1]
            part = call(graph, aten.slice.Tensor, total, 1, start, start + width)
            one.replace_all_uses_with(part)
            start += width
    for one in products:
        graph.erase_node(one)


def _is_small(product: fx.Node) -> bool:
    return _is_fraction(value_of(product).shape[1], value_of(product.args[0]).shape[1])


def _stored(node: Any) -> fx.Node | None:
    """Return the stored matrix of which a node is the transpose."""
    if isinstance(node, fx.Node) and node.target is aten.t.default:
        source = node.args[0]
        return source if isinstance(source, fx.Node) and source.op == "placeholder" else None
    return None


def stack_small_gradients(graph: fx.Graph) -> None:
    """Compute, in place, the gradients of the small matrices that multiply one value as one product."""
    siblings: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        if node.target is aten.mm.default and [user.op for user in node.users] == ["output"]:
            height, width = value_of(node).shape
            if _transposed(node.args[0]) is not None and _is_fraction(height, width):
                siblings[node.args[1]].append(node)
    for value, products in siblings.items():
        if len(products) > 1:
            _stack_gradients(graph, value, products)


def _stack_gradients(graph: fx.Graph, value: fx.Node, products: list[fx.Node]) -> None:
    with graph.inserting_before(products[-1]):
        joined = joined_columns(graph, [_transposed(one.args[0]) for one in products])
        total = call(graph, aten.mm.default, call(graph, aten.t.default, joined[0]), value)
        for one in products:
            rows = joined[1][_transposed(one.args[0])]
            one.replace_all_uses_with(call(graph, aten.slice.Tensor, total, 0, *rows))
    for one in products:
        graph.erase_node(one)


def transpose_narrow_gradients(graph: fx.Graph) -> None:
    """Compute, in place, each narrow product of a transposed value by rows: m^T n as (n^T m)^T."""
    for node in list(graph.nodes):
        if node.target is not aten.mm.default or _transposed(node.args[0]) is None:
            continue
        height, width = value_of(node).shape
        if _is_fraction(width, height):
            with graph.inserting_before(node):
                rows = call(
                    graph, aten.mm.default, call(graph, aten.t.default, node.args[1]), _transposed(node.args[0])
                )
                result = call(graph, aten.t.default, rows)
            node.replace_all_uses_with(result)
            graph.erase_node(node)


def stack_accumulated_products(graph: fx.Graph) -> None:
    """Join, in place, the small products by stored matrices that are added to one value."""
    for node in list(graph.nodes):
        if node.target is aten.addmm.default and not any(_adds_to(user, node) for user in node.users):
            _join_terms(graph, _chain(node))


def _chain(last: fx.Node) -> list[fx.Node]:
    """Return the products that are added one after another, from the first to the last."""
    chain = [last]
    while chain[-1].target is aten.addmm.default:
        before = chain[-1].args[0]
        if not isinstance(before, fx.Node) or len(before.users) > 1:
            break
        if before.target not in (aten.addmm.default, aten.mm.default):
            break
        chain.append(before)
    return chain[::-1]


def _adds_to(user: fx.Node, value: fx.Node) -> bool:
    return user.target is aten.addmm.default and user.args[0] is value


def _join_terms(graph: fx.Graph, chain: list[fx.Node]) -> None:
    """Take the small terms out of a chain, and add their joined product at its end."""
    small = [node for node in chain if _is_plain(node) and _has_small_stored_factor(node)]
    if len(small) < 2:
        return
    rest = [node for node in chain if node not in small]
    starts_small = chain[0] in small and chain[0].target is aten.mm.default
    if starts_small and rest and not _is_plain(rest[0]):
        return
    last = chain[-1]
    with graph.inserting_after(last):
        end = graph.call_function(aten.addmm.default, ())
    last.replace_all_uses_with(end)
    factors = {node.args[-2]: node.args[-1] for node in small}
    with graph.inserting_before(end):
        columns, _ = joined_columns(graph, list(factors))
        order: Any = columns.args[0]
        rows = call(graph, aten.cat.default, [factors[one] for one in order], 0)
        base = _without(graph, chain, small)
        target, operands = (aten.mm.default, ()) if base is None else (aten.addmm.default, (base,))
        total = call(graph, target, *operands, columns, rows)
    end.replace_all_uses_with(total)
    graph.erase_node(end)


def _without(graph: fx.Graph, chain: list[fx.Node], small: list[fx.Node]) -> Any:
    """Take terms out of a chain, and return its last value; None if nothing is left."""
    first: Any = chain[0].args[0] if chain[0].target is aten.addmm.default else None
    for node in chain:
        if node in small:
            continue
        if node.target is aten.addmm.default and first is None:
            with graph.inserting_before(node):
                new = call(graph, aten.mm.default, node.args[1], node.args[2])
            node.replace_all_uses_with(new)
            node = new
        elif node.target is aten.addmm.default:
            node.args = (first, *node.args[1:])
        first = node
    return first


def _is_plain(node: fx.Node) -> bool:
    return not node.kwargs


def _has_small_stored_factor(product: fx.Node) -> bool:
    factor = product.args[-1]
    return isinstance(factor, fx.Node) and factor.op == "placeholder" and _is_fraction(*value_of(factor).shape)


def joined_columns(graph: fx.Graph, parts: list[Any]) -> tuple[fx.Node, dict[Any, tuple[int, int]]]:
    """Return matrices of equal height beside one another, in the order of the graph, and the columns of each."""
    place = {node: i for i, node in enumerate(graph.nodes)}
    parts = sorted(set(parts), key=place.__getitem__)
    columns, start = dict[Any, tuple[int, int]](), 0
    for one in parts:
        columns[one] = (start, start := start + value_of(one).shape[1])
    return call(graph, aten.cat.default, parts, 1), columns


def _is_fraction(size: Any, of: Any) -> bool:
    return isinstance(size, int) and isinstance(of, int) and NARROW * size <= of


def _transposed(node: Any) -> Any:
    """Return the value of which a node is the transpose; None if it is none."""
    return node.args[0] if isinstance(node, fx.Node) and node.target is aten.t.default else None


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _numel(node: fx.Node) -> int:
    return math.prod(hint(size) for size in value_of(node).shape)
