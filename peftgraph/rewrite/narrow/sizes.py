"""What a call takes and gives where some axes of its operands are narrower: the literal sizes in its arguments.

An axis is narrow if it is R times shorter than in the base. Which axes of a result are narrow is read off its shape;
only sizes that stand in a call's arguments need a rule. Sizes of the base that are not multiples of R do not scale.
Shapes: R the reduction, F the size of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, fx

from peftgraph.ir.shape_inference import concrete_size
from peftgraph.rewrite.sequence.axes import format_sizes, same_size, view_groups
from peftgraph.sites.dataflow import ops

Arguments = tuple[tuple[Any, ...], dict[str, Any]]

VIEWS = ops.words("view reshape _unsafe_view")
PICKING = ops.words("select unbind index index_select gather take_along_dim roll flip cumsum diagonal topk sort")
PIECEWISE = ops.SCALE | ops.MASKING | ops.words("pow maximum minimum addcmul addcdiv lerp __and__ __or__ eq ne lt le")
EXPONENTS = (-0.5, 0.5, -0.25, 0.25)


class Misfit(Exception):
    """A call that does not scale; its text says why, after the name of the call."""


@dataclass(frozen=True)
class Scaling:
    """How sizes become narrow.

    Attributes:
        reduction: R.
        heads: the sizes of the model's heads: of the axes that a view makes, that of a head's features is narrow.
        in_scores: whether a call lies between the queries or keys of an attention and its result, so that its literal
            factor may be a power of the head's size.
    """

    reduction: int
    heads: Collection[int]
    in_scores: Callable[[fx.Node], bool]

    def shrinks(self, size: Any) -> bool:
        """Tell whether R divides a size."""
        number = concrete_size(size)
        return number is not None and number > 1 and number % self.reduction == 0

    def narrow_axes(self, before: Any, after: Any) -> frozenset[int]:
        """Return the axes on which a tensor is narrow.

        Raises:
            Misfit: its shape differs in another way.
        """
        if not isinstance(before, Tensor):
            return frozenset()
        pairs = list(zip(before.shape, after.shape, strict=True)) if before.dim() == after.dim() else []
        narrow = frozenset(i for i, (old, new) in enumerate(pairs) if not same_size(old, new))
        wrong = [i for i in narrow if not self.shrinks(pairs[i][0]) or pairs[i][0] != pairs[i][1] * self.reduction]
        if before.dim() != after.dim() or wrong:
            raise Misfit(f"would give {format_sizes(*after.shape)} in place of {format_sizes(*before.shape)}")
        return narrow

    def check(self, node: fx.Node, operands: Mapping[fx.Node, Any], after: Any) -> None:
        """Check that a result is that of the base with some axes narrow, and that no narrow axis was broadcast.

        Raises:
            Misfit: it is another one.
        """
        before = node.meta["val"]
        if isinstance(before, Tensor):
            found = self.narrow_axes(before, after)
            if ops.name(node) in PIECEWISE:
                for one, value in operands.items():
                    inner = self.narrow_axes(one.meta["val"], value)
                    shift = before.dim() - value.dim() if isinstance(value, Tensor) else 0
                    if not {axis + shift for axis in inner} <= found:
                        raise Misfit("combines narrow features with all of them")
        elif isinstance(before, list | tuple):
            for old, new in zip(before, after, strict=True):
                self.narrow_axes(old, new)

    def arguments(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Arguments:
        """Return the arguments of a call, its operands as they are, with the sizes that narrow operands need.

        Args:
            node: the call of the base.
            values: its operands' narrow values, by the base's.

        Raises:
            Misfit: it does not scale.
        """
        args, kwargs, name = list(node.args), dict(node.kwargs), ops.name(node)
        source = next((one for one in node.all_input_nodes if one in values), None)
        first = args[0] if args and isinstance(args[0], fx.Node) else source
        if first is None:
            return tuple(args), kwargs
        old, new = first.meta["val"], values.get(first, first.meta["val"])
        axes = self.narrow_axes(old, new) if isinstance(old, Tensor) else frozenset[int]()
        if name in ops.SDPA:
            return self._attended(args, kwargs, old)
        if name == "baddbmm" and "alpha" in kwargs and self.in_scores(node):
            kwargs["alpha"] = self._factor(cast("float", kwargs["alpha"]))
        elif name in ops.SCALE and self.in_scores(node):
            args = [self._factor(one) if isinstance(one, float | int) else one for one in args]
        elif axes and name in RULES:
            RULES[name](self, node, args, kwargs, axes)
        elif axes and name in PICKING:
            self._check_picking(node, axes)
        return tuple(args), kwargs

    def _attended(self, args: list[Any], kwargs: dict[str, Any], q: Tensor) -> Arguments:
        """Return the arguments of an attention, whose factor follows the size of a head if it is a power of it."""
        if kwargs.get("scale") is not None:
            kwargs["scale"] = self._factor(kwargs["scale"], int(q.shape[-1]))
        return tuple(args), kwargs

    def _factor(self, factor: float, *sizes: int) -> float:
        for size in sizes or self.heads:
            for exponent in EXPONENTS:
                if factor not in (0, 1) and abs(factor - size**exponent) < 1e-6 * factor:
                    return (size // self.reduction) ** exponent
        return factor

    def _part(self, size: Any, what: str) -> Any:
        if size % self.reduction:
            raise Misfit(f"{what} {size}, which {self.reduction} does not divide")
        return size // self.reduction

    def _viewed(self, node: fx.Node, args: list[Any], _: dict[str, Any], axes: frozenset[int]) -> None:
        before, after = args[0].meta["val"].shape, node.meta["val"].shape
        args[1] = self._resized(args[1], after, self._places(before, after, axes))

    def _places(self, before: Sequence[Any], after: Sequence[Any], axes: frozenset[int]) -> set[int]:
        """Return which axes that a view makes are narrow."""
        places, left = set[int](), set(axes)
        for ins, outs in view_groups(before, after):
            here = left.intersection(ins)
            left -= here
            if len(here) > 1:
                raise Misfit("joins two narrow axes")
            if here:
                places.add(self._place(outs, after))
        if left:
            raise Misfit(f"lays {format_sizes(*before)} out as {format_sizes(*after)}")
        return places

    def _place(self, outs: list[int], after: Sequence[Any]) -> int:
        """Return the narrow one of the axes that a narrow one was split into: a head's features, else the largest."""
        if len(outs) == 1:
            return outs[0]
        sizes = {axis: concrete_size(after[axis]) or 0 for axis in outs if self.shrinks(after[axis])}
        if not sizes:
            raise Misfit(f"splits features into {format_sizes(*(after[axis] for axis in outs))}")
        heads = [axis for axis in sizes if sizes[axis] in self.heads]
        several = [axis for axis in sizes if any(sizes[axis] % head == 0 for head in self.heads)]
        return max(heads or several or [axis for axis in sizes if sizes[axis] == max(sizes.values())])

    def _resized(self, sizes: Sequence[Any], after: Sequence[Any], places: set[int]) -> list[Any]:
        """Return literal sizes with those of narrow axes divided."""
        found = list(sizes)
        for axis in places:
            whole = concrete_size(after[axis])
            if not (isinstance(found[axis], int) and found[axis] == -1):
                if whole is None:
                    raise Misfit("takes the number of all features of all places from a computed size")
                found[axis] = self._part(whole, "has an axis of")
        return found

    def _expanded(self, node: fx.Node, args: list[Any], _: dict[str, Any], axes: frozenset[int]) -> None:
        after = node.meta["val"].shape
        shift = len(after) - args[0].meta["val"].dim()
        args[1] = self._resized(args[1], after, {axis + shift for axis in axes})

    def _unflattened(self, node: fx.Node, args: list[Any], _: dict[str, Any], axes: frozenset[int]) -> None:
        x = args[0].meta["val"]
        axis = args[1] % x.dim()
        if axis in axes:
            after = node.meta["val"].shape
            place = self._place(list(range(axis, axis + len(args[2]))), after)
            args[2] = self._resized(args[2], after[axis : axis + len(args[2])], {place - axis})

    def _split(self, node: fx.Node, args: list[Any], kwargs: dict[str, Any], axes: frozenset[int]) -> None:
        axis = cast("int", ops.argument(node, 2, "dim") or 0) % args[0].meta["val"].dim()
        if axis in axes:
            sizes = args[1]
            words = "splits off"
            args[1] = (
                [self._part(n, words) for n in sizes] if isinstance(sizes, list | tuple) else self._part(sizes, words)
            )

    def _chunked(self, node: fx.Node, args: list[Any], kwargs: dict[str, Any], axes: frozenset[int]) -> None:
        x = args[0].meta["val"]
        axis = cast("int", ops.argument(node, 2, "dim") or 0) % x.dim()
        if axis in axes and int(x.shape[axis]) % (self.reduction * args[1]):
            raise Misfit(f"splits {x.shape[axis]} features into {args[1]} parts, which do not shrink")

    def _sliced(self, node: fx.Node, args: list[Any], _: dict[str, Any], axes: frozenset[int]) -> None:
        x = args[0].meta["val"]
        defaults: tuple[Any, ...] = (0, 0, None, 1)
        axis, start, end, step = (*args[1:5], *defaults[len(args[1:5]) :])
        if axis % x.dim() not in axes:
            return
        size = int(x.shape[axis])
        bounds = [0 if start is None else start, size if end is None else end]
        if 0 <= bounds[0] < step and bounds[1] >= size and size % (step * self.reduction) == 0:
            return  # one of each pair
        numbers = [min(bound + size if bound < 0 else bound, size) for bound in bounds]
        args[1:4] = [axis, *(self._part(n, "takes features up to") for n in numbers)]

    def _narrowed(self, node: fx.Node, args: list[Any], _: dict[str, Any], axes: frozenset[int]) -> None:
        if args[1] % args[0].meta["val"].dim() in axes:
            args[2:4] = [self._part(n, "takes features up to") for n in args[2:4]]

    def _normed(self, node: fx.Node, args: list[Any], _: dict[str, Any], axes: frozenset[int]) -> None:
        x, sizes = args[0].meta["val"], args[1]
        last = range(x.dim() - len(sizes), x.dim())
        args[1] = [self._part(n, "normalises") if axis in axes else n for axis, n in zip(last, sizes, strict=True)]

    def _check_picking(self, node: fx.Node, axes: frozenset[int]) -> None:
        """Refuse a call that picks features by number."""
        x = cast("fx.Node", node.args[0]).meta["val"]
        if ops.name(node) == "index":
            indices = cast("Sequence[Any]", node.args[1])
            picked = {axis for axis, index in enumerate(indices) if index is not None}
        else:
            wanted = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
            picked = {one % x.dim() for one in (wanted if isinstance(wanted, list | tuple) else [wanted])}
        if not picked.isdisjoint(axes):
            raise Misfit("picks features by their numbers")


Resize = Callable[[Scaling, fx.Node, list[Any], dict[str, Any], frozenset[int]], None]
RULES: Mapping[str, Resize] = {
    **dict.fromkeys(VIEWS, Scaling._viewed),
    "expand": Scaling._expanded,
    "broadcast_to": Scaling._expanded,
    "unflatten": Scaling._unflattened,
    "split": Scaling._split,
    "split_with_sizes": Scaling._split,
    "chunk": Scaling._chunked,
    "slice": Scaling._sliced,
    "narrow": Scaling._narrowed,
    "layer_norm": Scaling._normed,
    "rms_norm": Scaling._normed,
    "native_layer_norm": Scaling._normed,
}
