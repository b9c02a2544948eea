"""Decides which values of a forward pass are kept for the backward pass, and which are computed again.

A minimum cut finds the fewest bytes from which the backward pass can be computed: between what has to be kept, such as
the results of matrix products, and what the backward pass reads, the cut passes through the values to keep (Chen et
al., Training Deep Nets with Sublinear Memory Cost, 2016, introduced computing values again; torch's partitioner finds
minimum cuts for a compiler that fuses elementwise operations). A budget lets the products be computed again that free
the most bytes for each operation.
"""

from __future__ import annotations

import math
from collections.abc import Set
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from peftgraph.optimise.clean_up import hint, is_random, is_view
from peftgraph.optimise.partition import Parts

aten = torch.ops.aten
PRODUCTS = {
    "mm", "addmm", "bmm", "baddbmm", "convolution", "_scaled_dot_product_flash_attention_for_cpu", "_grouped_mm",
    "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
}  # fmt: skip
SMALL = 8  # a value of at most this fraction of its operand is kept: reading it back is cheaper than reducing again


@dataclass(frozen=True)
class MemoryPlan:
    """What is kept of a forward pass.

    Attributes:
        kept: the values that the backward pass reads; it computes everything else that it needs from them.
        bytes: of the kept values that are not inputs, with the sizes of the call that was traced.
        repeated: multiplications and additions of the products that the backward pass computes again.
    """

    kept: tuple[fx.Node, ...]
    bytes: int
    repeated: int

    def largest_values(self, count: int = 8) -> tuple[tuple[str, str, int], ...]:
        """Return the largest kept values that are not inputs, as operator, sizes and bytes."""
        own = [node for node in self.kept if node.op != "placeholder" and bytes_of(node)]
        own.sort(key=bytes_of, reverse=True)
        shape = [" x ".join(str(hint(size)) for size in node.meta["val"].shape) for node in own]
        return tuple((_word(node), sizes, bytes_of(node)) for node, sizes in zip(own, shape, strict=True))[:count]


def plan_memory(parts: Parts, budget: float = 1.0) -> MemoryPlan:
    """Find the fewest bytes that a forward pass must keep.

    Args:
        parts: of a joint graph.
        budget: the fraction of the bytes that are kept when no product is computed again; between 0 and 1.
    """
    plan = _cut(parts, set())
    if budget >= 1.0:
        return plan
    costly = [node for node in parts.forward if is_product(node) or is_reduction(node)]
    if budget <= 0.0:
        return _cut(parts, set(costly))
    limit = budget * plan.bytes
    costly.sort(key=lambda node: operations_of(node) / max(1, bytes_of(node)))
    low, high = 0, len(costly)
    while low < high:  # the fewest products whose repetition is enough
        middle = (low + high) // 2
        if _cut(parts, set(costly[:middle])).bytes <= limit:
            high = middle
        else:
            low = middle + 1
    return _cut(parts, set(costly[:low]))


def _cut(parts: Parts, repeatable: Set[fx.Node]) -> MemoryPlan:
    """Return the plan of fewest bytes that computes no other product again."""
    import networkx as nx  # on first use: it takes a while to import

    cut = nx.DiGraph()
    cut.add_nodes_from(("forward", "backward"))
    for node in parts.forward:
        cut.add_edge((node, "in"), (node, "out"), capacity=_cost(node, parts))
        costly = (is_product(node) or is_reduction(node)) and node not in repeatable
        if isinstance(node.meta.get("val"), Tensor | tuple) and (costly or is_random(node) or node.op == "placeholder"):
            cut.add_edge("forward", (node, "in"))
        for user in node.users:
            if user in parts.members:
                cut.add_edge((node, "out"), (user, "in"))
    for node in parts.read_by_backward:
        cut.add_edge((node, "out"), "backward")
    _, (near, _) = nx.minimum_cut(cut, "forward", "backward")
    kept = [node for node in parts.forward if (node, "in") in near and (node, "out") not in near]
    kept += [node for node in parts.needed(parts.read_by_backward, kept) if node.op == "placeholder"]  # numbers
    kept = [node for node in parts.forward if node in set(kept)]
    again = parts.needed(parts.read_by_backward, kept)
    own = sum(bytes_of(node) for node in kept if node.op != "placeholder")
    return MemoryPlan(tuple(kept), own, sum(map(operations_of, again)))


def _cost(node: fx.Node, parts: Parts) -> float:
    """Return the bytes of keeping a value: infinite for views, whose memory is another value's, and for groups of
    results; almost nothing for stored tensors, which are there anyway."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return math.inf if isinstance(value, tuple | list) else 0.0
    if node.op == "placeholder":
        return 1.0 if node in parts.stored else bytes_of(node)
    return math.inf if is_view(node) else bytes_of(node)


def is_product(node: fx.Node) -> bool:
    """Return True if a node multiplies matrices, so that computing it again costs time."""
    return _word(node) in PRODUCTS


def is_reduction(node: fx.Node) -> bool:
    """Return True if a node's value has few of the values that it is computed from."""
    if is_view(node) or node.op != "call_function" or not isinstance(node.meta.get("val"), Tensor):
        return False
    return SMALL * bytes_of(node) <= max((bytes_of(one) for one in node.all_input_nodes), default=0)


def _word(node: fx.Node) -> str:
    return node.target._schema.name.split("::")[-1] if isinstance(node.target, torch._ops.OpOverload) else ""


def bytes_of(node: fx.Node) -> int:
    """Return the bytes of a node's value, all parts of it; 0 for numbers."""
    value = node.meta.get("val")
    tensors = [one for one in (value if isinstance(value, tuple | list) else (value,)) if isinstance(one, Tensor)]
    return sum(math.prod(hint(size) for size in one.shape) * one.element_size() for one in tensors)


def operations_of(node: fx.Node) -> int:
    """Return the multiplications and additions of a matrix product; 0 for every other node."""
    if not is_product(node):
        return 0
    tensors = [one.meta["val"] for one in node.all_input_nodes if isinstance(one.meta.get("val"), Tensor)]
    if "attention" in _word(node):  # scores, and the sum of values
        query, key = tensors[:2]
        return 4 * math.prod(hint(size) for size in query.shape) * hint(key.shape[-2])
    weight = tensors[-1]
    inner = (
        math.prod(hint(size) for size in weight.shape[1:]) if _word(node) == "convolution" else hint(weight.shape[-2])
    )
    return 2 * math.prod(hint(size) for size in node.meta["val"].shape) * inner
