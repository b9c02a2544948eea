"""A sequence that grows in the middle of a graph: its axis is followed through all that depends on it.

A model of pictures has as many places as a picture has patches. Its length is a number in the traced graph, or follows
from the sizes of the picture, and stands so in the arguments of views. Each such argument on the axis is made larger,
masks over places are worked out once more, and what the axis cannot be followed through is refused.

Shapes: T places, L rows.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, fx

from peftgraph.ir.builder import Builder, in_order
from peftgraph.rewrite.inputs import same_size
from peftgraph.rewrite.longer import END
from peftgraph.rewrite.match import Match
from peftgraph.rewrite.places import COPIES, PIECEWISE, Axes, Places, along, refusal, tensors
from peftgraph.rewrite.shapes import grown, partners, told
from peftgraph.sites import ops

VIEWS = ops.words("view reshape _unsafe_view")
PARTS = {"split": 2, "split_with_sizes": 2, "chunk": 2, "tensor_split": 2, "unbind": 1, "unflatten": 1}
PRODUCTS = ops.words("matmul bmm mm")
# What goes through these is as long as what they read, with no size of it among their arguments.
PASSED = (
    COPIES
    | ops.DROPOUT
    | ops.NORM
    | ops.REDUCTION
    | ops.SOFTMAX
    | ops.FILLED
    | ops.LIKE
    | ops.words("linear einsum transpose permute t numpy_T mT movedim swapaxes unsqueeze squeeze flatten getitem stack")
    | ops.words("adaptive_avg_pool1d cumsum diagonal zeros ones full arange")
)
Instead = dict[fx.Node, fx.Node]


class Following:
    """What depends on a value whose second axis gets L rows more, as far as its shape goes.

    Attributes:
        now: what is longer, with its shape.
        moves: masks and sizes that are read in a longer form from here on, and that form.
        results: what the model returns with the rows, and the axes that they are on.
    """

    def __init__(self, m: Match, op: Builder, start: fx.Node, longer: fx.Node, rows: int) -> None:
        self.m, self.op, self.rows = m, op, rows
        self.length = start.meta["val"].shape[1]
        self.now: dict[fx.Node, Any] = {start: longer.meta["val"]}
        self.moves: Instead = {}
        self._inside = _after(start) - set(op.nodes)
        self._readers: dict[fx.Node, set[fx.Node]] = {}
        self._places = Places(m, op, self.length, rows, self._inside)
        for node in list(in_order(m.graph)):
            if node in self._inside and node.op == "call_function":
                self._visit(node)
        self._hold()
        self.results = {leaf: self.axes(leaf) for leaf in m.graph.output_node().all_input_nodes if leaf in self.now}
        for node, value in self.now.items():
            if node is not start:
                node.meta["val"] = value

    def axes(self, node: fx.Node) -> Axes:
        """The axes of a value that the rows are on."""
        return self._axes(node, node.meta["val"], self.now.get(node, node.meta["val"]))

    def _axes(self, node: fx.Node, before: Any, after: Any) -> Axes:
        if not isinstance(before, Tensor):
            return frozenset()
        found = grown(before.shape, after.shape, self.rows)
        if found is None:
            sizes, longer = (told(*one.shape) for one in (before, after))
            raise refusal(self.m, node, f"would give {longer} instead of {sizes}, where the rows have no axis")
        return found

    def _visit(self, node: fx.Node) -> None:
        """Finds what a call gives, and makes the sizes larger that it takes."""
        if self.now.keys().isdisjoint(node.all_input_nodes):
            return
        before = node.meta["val"]
        instead = self._readied(node) if isinstance(before, Tensor | list | tuple) else {}
        values = ChainMap({old: new.meta["val"] for old, new in instead.items()}, self.now)
        try:
            after = self.op.common.inference.value_with(node, values)
        except RuntimeError as error:  # what torch says of sizes that do not fit
            raise refusal(self.m, node, f"does not take {self.rows} places more: {error}") from None
        pairs = zip(before, after, strict=True) if isinstance(before, list | tuple) else [(before, after)]
        changed = [
            self._axes(node, *pair) or not isinstance(pair[0], Tensor) and not same_size(*pair) for pair in pairs
        ]
        if any(changed):
            self.now[node] = after
        for old, new in instead.items():
            self.moves[old] = new
            self._readers.setdefault(old, set()).add(node)

    def _readied(self, node: fx.Node) -> Instead:
        """What a call reads instead of some operands, once its own numbers are made larger.

        Raises:
            PeftGraphError: it is not known what the call gives for rows.
        """
        name = ops.name(node)
        if name in VIEWS:
            return self._viewed(node)
        if name == "expand":
            return self._expanded(node)
        self._check_sizes(node)
        if name in PARTS:
            return self._parted(node, PARTS[name])
        match name:
            case "slice" | "select":
                return self._cut(node, name)
            case "cat":
                axis = cast("int", ops.argument(node, 1, "dim") or 0) % node.meta["val"].dim()
                grown_on = frozenset[int]().union(*map(self.axes, tensors(node))) - {axis}
                return self._agreed({one: grown_on for one in tensors(node)})
            case _ if name in PIECEWISE:
                return self._broadcast(node)
            case _ if name in PRODUCTS:
                return self._multiplied(node)
            case _ if name in ops.SDPA:
                return self._attended(node)
            case _ if name in PASSED or (name == "flip" and not node.meta["val"].is_floating_point()):
                return {}
            case _ if name in ops.CONV:
                raise refusal(self.m, node, "is a convolution over the places of a picture, and rows have none")
            case _:
                raise refusal(self.m, node, "is not known to go through with more places")

    # sizes

    def _viewed(self, node: fx.Node) -> Instead:
        """A view: an axis of the rows must stay an axis of its own."""
        source = cast("fx.Node", node.args[0])
        before, after = (one.meta["val"].shape for one in (source, node))
        kept = partners(before, after)
        axes = self.axes(source)
        if any(axis not in kept for axis in axes):
            words = f"lays its {told(self.length)} places out as {told(*after)}, where rows have no place"
            raise refusal(self.m, node, words)
        return self._resized(node, frozenset(kept[axis] for axis in axes))

    def _expanded(self, node: fx.Node) -> Instead:
        """An expansion: where a size follows the rows by itself, what is expanded has them too, or has one place."""
        source = cast("fx.Node", node.args[0])
        shift = node.meta["val"].dim() - source.meta["val"].dim()
        follow = frozenset(axis for axis, size in enumerate(cast("Iterable[Any]", node.args[1])) if size in self.now)
        axes = frozenset(axis + shift for axis in self.axes(source)) | follow
        return self._resized(node, axes) | self._agreed({source: along(source, node, axes)})

    def _resized(self, node: fx.Node, axes: Axes) -> Instead:
        """Makes the sizes on some axes larger, where they do not follow by themselves."""
        instead: Instead = {}
        kept: set[fx.Node] = set()
        for axis, size in enumerate(cast("Iterable[Any]", node.args[1])):
            if not isinstance(size, fx.Node):
                if axis in axes and size != -1:
                    self.op.stretch(node, 1, axis, self.rows)
            elif size in self.now:
                kept |= set() if axis in axes else {size}
            elif axis in axes:
                instead[size] = self._places.size(size)
            else:
                kept.add(size)
        wrong = next((size for size in kept if size in instead or size in self.now), None)
        if wrong is not None:
            raise refusal(self.m, node, "takes the number of places for another size as well")
        return instead

    def _check_sizes(self, node: fx.Node) -> None:
        """Refuses a call that computes with the number of places."""
        for one in node.all_input_nodes:
            value = one.meta["val"]
            if not isinstance(value, Tensor | list | tuple) and one not in self.now and same_size(value, self.length):
                raise refusal(self.m, node, "computes with the number of places")
        source = node.args[0] if node.args else None
        factor = node.args[1] if len(node.args) > 1 else None
        while isinstance(source, fx.Node) and ops.name(source) in COPIES:
            source = source.args[0]
        if isinstance(source, fx.Node) and isinstance(factor, int | float) and ops.name(node) in ops.SCALE:
            summed = ops.name(source) == "sum" and any(self.axes(one) for one in tensors(source))
            if (
                summed
                and isinstance(self.length, int)
                and any(abs(factor - n) < 1e-9 * n for n in _powers(self.length))
            ):
                raise refusal(self.m, node, "computes with the number of places")

    # axes

    def _cut(self, node: fx.Node, name: str) -> Instead:
        """A part of an axis of the rows: what the code counts from an end that it does not name is not known."""
        source, *rest = cast("list[Any]", list(node.args))
        defaults = (0, 0, END, 1) if name == "slice" else (0, 0)
        axis, *bounds = (*rest, *defaults[len(rest) :])
        size = source.meta["val"].shape[axis % source.meta["val"].dim()]
        if axis % source.meta["val"].dim() in self.axes(source):
            known = all(
                isinstance(bound, int) and (bound <= 1 or bound >= END or _is_less(bound + 1, size)) for bound in bounds
            )
            if not known or (name == "slice" and bounds[2] != 1):
                raise refusal(self.m, node, f"takes places by numbers that may be counted from the end of {told(size)}")
        return {}

    def _parted(self, node: fx.Node, position: int) -> Instead:
        source = cast("fx.Node", node.args[0])
        axis = cast("int", ops.argument(node, position, "dim") or 0)
        if axis % source.meta["val"].dim() in self.axes(source):
            words = f"parts the {told(self.length)} places, and it is not known which part has the rows"
            raise refusal(self.m, node, words)
        return {}

    def _broadcast(self, node: fx.Node) -> Instead:
        operands = tensors(node)
        width = node.meta["val"].dim()
        shifts = {one: width - one.meta["val"].dim() for one in operands}
        axes = frozenset(axis + shifts[one] for one in operands for axis in self.axes(one))
        return self._agreed({one: along(one, node, axes) for one in operands})

    def _multiplied(self, node: fx.Node) -> Instead:
        """A product of matrices: both have the rows where they are summed over, or neither."""
        a, b = cast("tuple[fx.Node, fx.Node]", node.args[:2])
        wanted = {a: self.axes(a), b: self.axes(b)}
        for one, axis, other, its in ((a, -1, b, -2), (b, -2, a, -1)):
            dims = [x.meta["val"].dim() for x in (one, other)]
            if dims[0] + axis in self.axes(one) and dims[1] > 1:
                wanted[other] |= {dims[1] + its}
        return self._agreed(wanted)

    def _attended(self, node: fx.Node) -> Instead:
        """Attention: a mask has the rows of the queries and of the keys."""
        q, k, v = cast("tuple[fx.Node, fx.Node, fx.Node]", node.args[:3])
        rows = {one: one.meta["val"].dim() - 2 for one in (q, k, v)}
        if any(self.axes(one) - {rows[one]} for one in (q, k, v)):
            raise refusal(self.m, node, "has the places on another axis than the queries, keys and values")
        wanted = {one: self.axes(one) for one in (q, k, v)}
        if wanted[k] or wanted[v]:
            wanted |= {k: frozenset({rows[k]}), v: frozenset({rows[v]})}
        mask = ops.operand(node, 3, "attn_mask")
        if mask is not None:
            sizes = mask.meta["val"].shape
            on = {len(sizes) - 2: wanted[q], len(sizes) - 1: wanted[k]}
            wanted[mask] = frozenset(axis for axis, has in on.items() if has and not same_size(sizes[axis], 1))
        return self._agreed(wanted)

    def _agreed(self, wanted: Mapping[fx.Node, Axes]) -> Instead:
        """Longer forms of the operands that lack the rows on some axes."""
        return {one: self._places.longer(one, axes) for one, axes in wanted.items() if axes - self.axes(one)}

    def _hold(self) -> None:
        """Lets all others read the masks and sizes that they read, where some read longer ones.

        Raises:
            PeftGraphError: something with the rows reads one both ways.
        """
        for value, readers in self._readers.items():
            others = set(value.users) - readers
            both = next((node for node in others if node in self._inside and node in self.now), None)
            if both is not None:
                raise refusal(
                    self.m, both, f"reads %{value.meta.get('label', value.name)} for {told(self.length)} places"
                )
            self.op.held |= others


def _after(start: fx.Node) -> set[fx.Node]:
    """Everything that depends on a value, by its sizes alone too."""
    found, todo = set[fx.Node](), [start]
    while todo:
        fresh = [user for user in todo.pop().users if user not in found]
        found.update(fresh)
        todo += fresh
    return found


def _is_less(number: int, size: Any) -> bool:
    """Whether a number is less than a size, as far as is known: all of a size that varies is larger than it is."""
    return not isinstance(size, int) or number < size


def _powers(length: int) -> tuple[float, ...]:
    return (length, 1 / length, length**0.5, length**-0.5)
