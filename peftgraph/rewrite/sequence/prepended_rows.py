"""Prepended rows: where they stand in a sequence of tokens, and what follows from it for inputs, values and results.

Rows stand after the first `after` tokens of each example: of all its positions, or of those after the padding on its
left. Of the rows is said what is said of the token before them, or of the first one where they stand before all: its
number, its type, that it is no padding. Positions count on, and labels are what the loss ignores.
A graph that continues earlier calls holds P positions of them in its cache, the rows among them; a first call has none.
Of L rows a call adds those after the first P: all of them, or none.

Shapes: B batch, T tokens of the call, L rows, N = L + T positions, D features.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import fx

from peftgraph.errors import PeftGraphError
from peftgraph.ir.builder import Builder
from peftgraph.ir.modes import SEQUENCE_AXIS
from peftgraph.rewrite.match import Match
from peftgraph.rewrite.sequence.axes import END, same_size
from peftgraph.rewrite.sequence.token_inputs import (
    NO_INPUTS,
    PaddingMask,
    TokenInputs,
    of_tokens,
    read_token_mask,
    to_device_of,
)
from peftgraph.sites.dataflow import ops
from peftgraph.sites.ports import input_port, result_port

aten = torch.ops.aten


class PrependedRows:
    """L rows at one insertion position of a sequence.

    Attributes:
        rows: L.
        after: how many tokens stand before the rows.
        inputs: what runs along the tokens.
        length: T as a size of the graph, for values that are computed again.
        cached_keys: the input that holds the keys of earlier calls, and those of the rows among them.
        lengths: how many of the L rows each example has, (B, 1); None for all of them. The positions that it does not
            use are behind its last token, and hidden as padding.
    """

    def __init__(
        self,
        m: Match,
        op: Builder,
        rows: int,
        after: int = 0,
        inputs: TokenInputs = NO_INPUTS,
        *,
        length: object = None,
        skips_padding: bool = False,
        cached_keys: fx.Node | None = None,
        lengths: fx.Node | None = None,
    ) -> None:
        self.m, self.op, self.rows, self.after, self.inputs, self.length = m, op, rows, after, inputs, length
        self.cached_keys = cached_keys
        self.lengths = lengths
        self._padding = inputs.mask if skips_padding else None
        self._names = {m.value(input_port(name)): name for name in (*inputs.along, *inputs.whole)}

    # inputs

    def input(self, name: str) -> fx.Node:
        """Return an input of the tokens, with entries for the rows: (B, T) -> (B, N).

        Raises:
            PeftGraphError: it has more axes.
        """
        x, mask = of_tokens(self.m, name), self.inputs.mask
        is_mask = mask is not None and mask.name == name and self._padding is None
        entry = int(not mask.hides) if mask is not None and is_mask else None
        extended = self._with_entries(x, entry, whole=name in self.inputs.whole)
        if self.lengths is not None and mask is not None and mask.name == name:
            extended = self._without_unused(extended, int(mask.hides))
        if name not in self.inputs.positions:
            return extended
        return self.op.call(aten.add.Tensor, extended, self._of_call(self._position_offset()))

    def labels(self, name: str, ignored: int) -> fx.Node:
        """Return labels, (B, T) -> (B, N), with what the loss ignores for the rows."""
        extended = self._with_entries(self.m.value(input_port(name)), ignored)
        return extended if self.lengths is None else self._without_unused(extended, ignored)

    def all_inputs(self) -> dict[str, fx.Node]:
        """Return every input that runs along the tokens, and the labels, by port."""
        names = (*self.inputs.whole, *self.inputs.along)
        extended = {input_port(name): self.input(name) for name in names}
        return extended | {input_port(name): self.labels(name, ignored) for name, ignored in self.inputs.labels}

    def recompute(self, node: fx.Node) -> fx.Node:
        """Return the value of `node` with the inputs that hold the rows; `node` itself where it does not depend on
        them.

        Raises:
            PeftGraphError: it depends on them by way of the model's layers.
        """
        return self.op.shared_value(f"{node.name} for {self.rows} more", lambda: self._recompute(node))

    def _recompute(self, node: fx.Node) -> fx.Node:
        if node in self._names:
            return self.input(self._names[node])
        if node.op != "call_function":
            return node
        if ops.name(node) in ops.CONTRACTION:
            raise PeftGraphError(
                f"{self.m.site.id}: what is needed for {self.rows} more rows depends on %{node.name}, a product of the "
                "model's own, and not on the inputs and their sizes alone."
            )
        is_size = node.target is aten.sym_size.int
        if is_size and same_size(node.meta["val"], self.length):
            return self.op.call(operator.add, node, self.rows)
        operands = [one for one in node.all_input_nodes if not is_size or one in self._names]
        copies = {operand: self.recompute(operand) for operand in operands}
        return node if all(old is new for old, new in copies.items()) else self.op.copy_call(node, copies)

    # values

    def insert(self, x: fx.Node, rows: fx.Node) -> fx.Node:
        """Return x (B, T, ...) with rows (B, L, ...) at the insertion position of every example."""
        before = [self._slice(x, 1, 0, self.after)] if self.after else []
        rest = self._slice(x, 1, self.after) if self.after else x
        return self.op.call(aten.cat.default, [*before, rows, rest], 1)

    def overwrite(self, x_BND: fx.Node, rows_LD: fx.Node, example_B: fx.Node | None = None) -> fx.Node:
        """Return x, which has entries for the rows already, with the rows there.

        Args:
            x_BND: embedded tokens.
            rows_LD: the rows; (M, L, D) if examples have rows of their own.
            example_B: which of the M rows each example has.
        """
        op = self.op
        if self._start() is None and self.lengths is None:
            if self.cached_keys is not None:
                rows_LD = self._slice(rows_LD, 0, self._cached_rows())
            *before, rest = self._around(x_BND, 1)
            return op.call(aten.cat.default, [*before, self.for_batch(rows_LD, x_BND), rest], 1)
        number_BN = to_device_of(op, self._expand(self._of_call(self._number()), x_BND), x_BND)
        place = op.call(aten.clamp.default, number_BN, 0, self.rows - 1)
        if example_B is not None:
            first_B1 = op.call(aten.unsqueeze.default, op.call(aten.mul.Tensor, example_B, self.rows), 1)
            place = op.call(aten.add.Tensor, place, first_B1)
            rows_LD = op.call(aten.flatten.using_ints, rows_LD, 0, 1)
        row_BND = op.call(aten.embedding.default, rows_LD, place)
        return op.call(aten.where.self, op.call(aten.unsqueeze.default, self._is_row(number_BN), -1), row_BND, x_BND)

    def for_batch(self, rows_LD: fx.Node, x: fx.Node) -> fx.Node:
        """Return the rows for every example of x, (B, L, D)."""
        batch = self.op.call(aten.sym_size.int, x, 0)
        return self.op.call(aten.expand.default, self.op.call(aten.unsqueeze.default, rows_LD, 0), [batch, -1, -1])

    def cut(self, value: fx.Node, axis: int) -> fx.Node:
        """Return `value` without the rows' entries on an axis."""
        op, start = self.op, self._start()
        if start is None and self.lengths is None:
            around = self._around(value, axis)
            return around[0] if len(around) == 1 else op.call(aten.cat.default, around, axis)
        if axis == 0:
            sizes = " x ".join(map(str, value.meta["val"].shape))
            raise PeftGraphError(
                f"A result has the tokens on its first axis, {sizes}, and the rows of each example stand at a position "
                'of their own, so it is not known where to cut. Choose returns="all".'
            )
        kept = self._count(op.call(operator.sub, op.call(aten.sym_size.int, value, axis), self._added()), value)
        if start is None:
            behind = op.call(aten.ge.Scalar, kept, self.after)
        else:
            first = start if self.cached_keys is None else op.call(aten.sub.Scalar, start, self._cached())
            behind = op.call(aten.ge.Tensor, kept, first)
        if self.lengths is None:
            offset = op.call(aten.mul.Scalar, behind, self._added())
        else:
            offset = op.call(aten.mul.Tensor, behind, self.lengths)
        index = op.call(aten.add.Tensor, kept, offset)
        for _ in range(axis - 1):
            index = op.call(aten.unsqueeze.default, index, 1)
        for _ in range(value.meta["val"].dim() - axis - 1):
            index = op.call(aten.unsqueeze.default, index, -1)
        return op.call(aten.take_along_dim.default, value, to_device_of(op, index, value), axis)

    def cut_results(self, length: object) -> dict[str, fx.Node]:
        """Return what the model returns for each of `length` positions, without what it gives for the rows, by port.

        Raises:
            PeftGraphError: a result has the tokens on its first axis.
        """
        shorter: dict[str, fx.Node] = {}
        for leaf in self.m.graph.output_node().all_input_nodes:
            base = self.m.names[self.m.edits.base_value(leaf.name)]
            sizes = base.meta["val"].shape if isinstance(base.meta["val"], torch.Tensor) else ()
            axes = [axis for axis, size in enumerate(sizes) if same_size(size, length)]
            if axes:
                shorter[result_port(base.name)] = self.cut_axes(self.m.value(result_port(base.name)), axes)
        return shorter

    def cut_axes(self, value: fx.Node, axes: list[int]) -> fx.Node:
        """Return `value` without the rows' entries on several axes."""
        for axis in axes:
            value = self.cut(value, axis)
        return value

    # sizes: P positions in the cache, and of the L rows those that are added in this call

    def _cached(self) -> fx.Node:
        """Return P."""
        assert self.cached_keys is not None
        keys = self.m.value(input_port(self.cached_keys.name))
        return self._once("cached", lambda: self.op.call(aten.sym_size.int, keys, SEQUENCE_AXIS))

    def _added(self) -> fx.Node | int:
        """Return L in a first call, 0 in later ones: the rows after the first P."""
        if self.cached_keys is None:
            return self.rows

        def added() -> fx.Node:
            return self.op.call(torch.sym_max, 0, self.op.call(operator.sub, self.rows, self._cached()))

        return self._once("added", added)

    def _cached_rows(self) -> fx.Node:
        """Return how many of the P positions hold rows; the others hold tokens."""
        return self._once("cached rows", lambda: self.op.call(operator.sub, self.rows, self._added()))

    # positions: j among all P + added + T of this call and earlier ones, and the number j - start of the row there

    def _start(self) -> fx.Node | None:
        """Return the position of the first row, (B, 1); None where it is `after` in every example."""
        mask = self._padding
        return None if mask is None else self._once("start", lambda: self._after_padding(mask))

    def _after_padding(self, mask: PaddingMask) -> fx.Node:
        op = self.op
        closed_BT = op.call(aten.eq.Scalar, op.call(aten.cumsum.default, read_token_mask(self.m, op, mask), 1), 0)
        inner_BT = self._slice(closed_BT, 1, 0, -1)  # an example of nothing but padding keeps one token
        padding_B1 = op.call(aten.sum.dim_IntList, inner_BT, [1], True)
        return op.call(aten.add.Scalar, padding_B1, self.after) if self.after else padding_B1

    def _number(self) -> fx.Node:
        """Return the number of the row at each position: negative before the rows, L and more after them."""
        op, start = self.op, self._start()

        def number() -> fx.Node:
            like = self.m.value(input_port(self.inputs.along[0]))
            count = op.call(operator.add, op.call(aten.sym_size.int, like, 1), self._added())
            if self.cached_keys is not None:
                count = op.call(operator.add, count, self._cached())
            positions = self._count(count, like)
            if start is None:
                return op.call(aten.sub.Scalar, positions, self.after) if self.after else positions
            return op.call(aten.sub.Tensor, positions, start)

        return self._once("number", number)

    def _position_offset(self) -> fx.Node:
        """Return how many positions each one is after the token that it repeats: 0 before the rows, L after them.

        A row after a token is 1 after it; the first row before all tokens is where the first token was.
        """

        def offset() -> fx.Node:
            number = self._number()
            number = self.op.call(aten.add.Scalar, number, 1) if self.after else number
            if self.lengths is None:
                return self.op.call(aten.clamp.default, number, 0, self.rows)
            return self.op.call(aten.minimum.default, self.op.call(aten.clamp.default, number, 0), self.lengths)

        return self._once("offset", offset)

    def _source(self) -> fx.Node:
        """Return the token that each position repeats, counted over all calls."""

        def source() -> fx.Node:
            offset = self._position_offset()
            positions = self._count(self.op.call(aten.sym_size.int, offset, 1), offset)
            return self.op.call(aten.sub.Tensor, positions, offset)

        return self._once("source", source)

    def _last(self) -> fx.Node:
        """Return T - 1."""
        like = self.m.value(input_port(self.inputs.along[0]))
        return self.op.call(operator.sub, self.op.call(aten.sym_size.int, like, 1), 1)

    def _without_unused(self, x: fx.Node, entry: int) -> fx.Node:
        """Return x (B, N) with an entry at the positions behind the last token, which examples with fewer rows have."""
        op = self.op
        unused = op.call(aten.gt.Scalar, self._source(), self._last())
        return op.call(aten.masked_fill.Scalar, x, self._expand(unused, x), entry)

    def _source_of_call(self) -> fx.Node:
        """Return the token of this call that each position of it repeats."""

        def source() -> fx.Node:
            tokens = self.op.call(operator.sub, self._cached(), self._cached_rows())
            source = self.op.call(aten.sub.Scalar, self._of_call(self._source()), tokens)
            return self.op.call(
                aten.clamp.default, source, 0, self._last()
            )  # an example may be padding up to this call

        if self.lengths is not None:
            return self._once(
                "clamped source", lambda: self.op.call(aten.clamp.default, self._source(), None, self._last())
            )
        return self._source() if self.cached_keys is None else self._once("source of the call", source)

    def _with_entries(self, x: fx.Node, entry: int | None, whole: bool = False) -> fx.Node:
        """Return x (B, T) with an entry for every row that is added: a number, or that of the token that rows
        repeat."""
        op = self.op
        if self._start() is None and self.cached_keys is None and self.lengths is None:
            token = self._slice(x, 1, max(self.after - 1, 0), max(self.after, 1))
            token = token if entry is None else op.call(aten.full_like.default, token, entry)
            return self.insert(x, op.call(aten.expand.default, token, [-1, self.rows]))
        source = self._source() if whole else self._source_of_call()
        extended = op.call(aten.gather.default, x, 1, self._expand(source, x))
        if entry is None:
            return extended
        is_row = self._is_row(self._expand(self._of_call(self._number()), x))
        return op.call(aten.masked_fill.Scalar, extended, is_row, entry)

    # small pieces

    def _once(self, name: str, build: Callable[[], fx.Node]) -> fx.Node:
        return self.op.shared_value(f"{self.m.site.id}.{name}", build)

    def _slice(self, x: fx.Node, axis: int, start: int | fx.Node, stop: int | fx.Node = END) -> fx.Node:
        return self.op.call(aten.slice.Tensor, x, axis, start, stop)

    def _around(self, x: fx.Node, axis: int) -> list[fx.Node]:
        """Return what stands before the rows, if anything does, and after them, where they start at `after`."""
        stop = self._added()
        if self.after:
            stop = self.op.call(operator.add, stop, self.after) if isinstance(stop, fx.Node) else stop + self.after
        rest = self._slice(x, axis, stop)
        return [self._slice(x, axis, 0, self.after), rest] if self.after else [rest]

    def _of_call(self, x: fx.Node) -> fx.Node:
        """Return the positions of this call, of all."""
        return x if self.cached_keys is None else self._slice(x, 1, self._cached())

    def _is_row(self, number: fx.Node) -> fx.Node:
        first = self.op.call(aten.ge.Scalar, number, 0)
        if self.lengths is None:
            last = self.op.call(aten.lt.Scalar, number, self.rows)
        else:
            last = self.op.call(aten.lt.Tensor, number, self.lengths)
        return self.op.call(aten.logical_and.default, first, last)

    def _count(self, size: fx.Node, like: fx.Node) -> fx.Node:
        """Return 0, 1, ... size - 1, (1, size), on the device of `like`."""
        counted = self.op.call(aten.arange.default, size, device=like.meta["val"].device)
        return self.op.call(aten.unsqueeze.default, counted, 0)

    def _expand(self, index: fx.Node, like: fx.Node) -> fx.Node:
        """Expand (1 or B, N) to (B, N), B as `like` has it."""
        return self.op.call(aten.expand.default, index, [self.op.call(aten.sym_size.int, like, 0), -1])
