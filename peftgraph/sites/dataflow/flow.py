"""What one forward pass over the graph can tell: shapes, raw weights, constants, and who comes before whom.

Ancestors are bit masks over the node order, so "does b descend from a" costs one shift. Edges that carry
only sizes (sym_size and the arithmetic on it) are no ancestry.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx

from peftgraph.sites.dataflow import ops


def hint(size: Any) -> int:
    """Return the example's value of a size that may be symbolic."""
    if isinstance(size, int):
        return size
    value = getattr(getattr(size, "node", None), "hint", None)
    return 1 if value is None else int(value)


class Flow:
    """Facts about a canonical graph; computed once, read by every search."""

    def __init__(self, graph: fx.Graph, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors = tensors
        self.nodes: list[fx.Node] = list(graph.nodes)
        self.order: dict[fx.Node, int] = {node: i for i, node in enumerate(self.nodes)}
        self._before: list[int] = []
        self._raw: set[fx.Node] = set()
        self._fed: set[fx.Node] = set()  # nodes that depend on an input of the model
        for node in self.nodes:
            self._visit(node)

    def _visit(self, node: fx.Node) -> None:
        mask = 0
        inputs = self.operands(node)
        for source in inputs:
            mask |= self._before[self.order[source]] | (1 << self.order[source])
        self._before.append(mask)
        if node.op == "placeholder" or any(source in self._fed for source in inputs):
            self._fed.add(node)
        if node.op == "get_attr":
            self._raw.add(node)
        elif node.op == "call_function" and ops.name(node) in ops.LAYOUT | ops.CAST:
            floats = [source for source in inputs if self.floating(source)]
            if floats and all(source in self._raw for source in floats):
                self._raw.add(node)

    def value(self, node: fx.Node) -> Any:
        return node.meta.get("val")

    def carries_tensor(self, node: fx.Node) -> bool:
        value = self.value(node)
        if isinstance(value, (list, tuple)):
            return any(isinstance(part, torch.Tensor) for part in value)
        return isinstance(value, torch.Tensor)

    def operands(self, node: fx.Node) -> list[fx.Node]:
        """Return the tensor inputs, in argument order; without those that lend their size or dtype alone."""
        inputs = [source for source in node.all_input_nodes if self.carries_tensor(source)]
        kind = ops.name(node)
        return [] if kind in ops.FILLED else inputs[:1] if kind in ops.LIKE else inputs

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """Return the example's shape; () for what is no single tensor."""
        value = self.value(node)
        return tuple(hint(size) for size in value.shape) if isinstance(value, torch.Tensor) else ()

    def counted(self, node: fx.Node) -> bool:
        """Are all sizes of a tensor known without the values of another (how many rows an expert gets is not)?"""
        sizes = getattr(self.value(node), "shape", ())
        return all(isinstance(size, int) or size.node.hint is not None for size in sizes)

    def floating(self, node: fx.Node) -> bool:
        value = self.value(node)
        if isinstance(value, (list, tuple)):
            parts = [part for part in value if isinstance(part, torch.Tensor)]
            return any(part.is_floating_point() or part.is_complex() for part in parts)
        return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())

    def raw(self, node: fx.Node) -> bool:
        """Tell whether it is a parameter, or one that was only moved, cut or cast."""
        return node in self._raw

    def parametrised(self, node: fx.Node) -> bool:
        """Tell whether it is computed from stored tensors alone, by more than moves and casts, as a parametrisation
        computes a weight."""
        return node.op == "call_function" and self.constant(node) and self.floating(node) and not self.raw(node)

    def parametrised_leaf(self, node: fx.Node) -> fx.Node | None:
        """Return a stored tensor that a computed weight is made of and that has its shape; None where none has."""
        shape = self.shape(node)
        stored = [one for one in self.members(self.before(node)) if one.op == "get_attr" and self.floating(one)]
        return next((one for one in stored if self.shape(one) == shape), None)

    def constant(self, node: fx.Node) -> bool:
        """Tell whether it is computed without the model's inputs (parameters may be in it)."""
        return node not in self._fed

    def signal(self, node: fx.Node) -> bool:
        """Tell whether it is a float value that is no raw weight."""
        return self.floating(node) and node not in self._raw

    def descends(self, node: fx.Node, source: fx.Node) -> bool:
        """Tell whether `node` depends on `source`, or is `source`."""
        return node is source or bool(self._before[self.order[node]] >> self.order[source] & 1)

    def before(self, node: fx.Node) -> int:
        return self._before[self.order[node]]

    def bit(self, node: fx.Node) -> int:
        return 1 << self.order[node]

    def members(self, mask: int) -> Iterator[fx.Node]:
        """Yield the nodes of a mask, latest first."""
        while mask:
            top = mask.bit_length() - 1
            yield self.nodes[top]
            mask ^= 1 << top

    def between(self, source: fx.Node, node: fx.Node) -> list[fx.Node]:
        """Return the values on the ways from `source` to `node`, without either, in order."""
        mask = self.before(node) & ~self.before(source) & ~self.bit(source)
        return [one for one in self.members(mask) if self.descends(one, source)][::-1]

    def scaling(self, node: fx.Node) -> bool:
        """Tell whether it is a multiplication or division by a number or by a constant vector (layer scale, gain)."""
        if ops.name(node) not in ops.SCALE:
            return False
        signals = [source for source in self.operands(node) if not self.constant(source)]
        others = [source for source in self.operands(node) if self.constant(source)]
        return len(signals) == 1 and all(sum(size > 1 for size in self.shape(other)) <= 1 for other in others)

    def channelwise(self, node: fx.Node) -> bool:
        """Tell whether it is a depthwise convolution: it mixes positions, and leaves every feature where it is."""
        groups = ops.argument(node, 6, "groups")
        if ops.name(node) not in ops.CONV or "transpose" in ops.name(node) or not isinstance(groups, int):
            return False
        image, kernel = self.operands(node)[:2]
        return groups > 1 and self.shape(kernel)[1] == 1 and groups == self.shape(image)[-len(self.shape(kernel)) + 1]

    def source(self, node: fx.Node) -> fx.Node | None:
        """Return the value a layout, cast, dropout or scaling passes on; None where the node does more than that."""
        if node.op != "call_function":
            return None
        kind = ops.name(node)
        if kind in ops.DROPOUT or kind in ops.CAST or (kind in ops.LAYOUT and kind not in ("cat", "stack")):
            inputs = [source for source in self.operands(node) if self.signal(source)]
            return inputs[0] if inputs else None
        if self.scaling(node):
            return next(source for source in self.operands(node) if not self.constant(source))
        return None

    def strip(self, node: fx.Node) -> fx.Node:
        """Walk back over everything that only moves, casts, drops or scales."""
        while (source := self.source(node)) is not None:
            node = source
        return node

    def uncast(self, node: fx.Node) -> fx.Node:
        while ops.name(node) in ops.CAST | {"contiguous", "clone", "alias"}:
            node = self.operands(node)[0]
        return node

    def picks(self, node: fx.Node) -> fx.Node | None:
        """Return the computed index by which a raw weight was gathered, one expert a token; None if it was not."""
        while node in self._raw and node.op != "get_attr":
            chosen = [source for source in self.operands(node) if not self.floating(source)]
            if chosen:
                return chosen[0]
            node = self.operands(node)[0]
        return None

    def leaf(self, node: fx.Node) -> fx.Node | None:
        """Return the get_attr a constant is made of; None unless there is exactly one floating one."""
        while node in self._raw and node.op != "get_attr":
            floats = [source for source in self.operands(node) if self.floating(source)]
            if len(floats) != 1:
                return None
            node = floats[0]
        if node.op == "get_attr":
            return node
        mask = self.before(node)
        leaves = [one for one in self.members(mask) if one.op == "get_attr" and self.floating(one)]
        return leaves[0] if len(leaves) == 1 else None
