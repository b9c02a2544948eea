"""Where the rows in front of the tokens stand: places, the number of the row at each, and the token that it repeats.

A graph that continues earlier calls holds P places of them in its cache, the rows among them; a first call has none.
Of L rows a call adds those behind the first P: all of them, or none.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import fx

from peftgraph.errors import PeftGraphError
from peftgraph.ir.builder import Builder
from peftgraph.ir.modes import SEQUENCE_AXIS
from peftgraph.rewrite.match import INPUT, Match
from peftgraph.rewrite.sequence.longer import END
from peftgraph.rewrite.sequence.token_inputs import (
    PaddingMask,
    TokenInputs,
    find_token_inputs,
    of_tokens,
    read_token_mask,
    same_size,
    to_device_of,
)
from peftgraph.sites import attention, kind

aten = torch.ops.aten


def checked_inputs(m: Match) -> TokenInputs:
    """The inputs that run along the tokens that a table lookup embeds.

    Raises:
        PeftGraphError: it embeds no tokens, the length is fixed, or an input runs along it in a form that rows do not
            fit in.
    """
    shape = m.output.meta["val"].shape if m.has("output") else ()
    sizes = " x ".join(map(str, shape))
    if m.site.role != "embedding" or len(shape) != 3:
        raise PeftGraphError(
            f"{m.site.id} is no embedding of tokens (batch, tokens) but gives {sizes}; choose the one with at=."
        )
    if isinstance(shape[1], int):
        raise PeftGraphError(f"{m.site.id} gives {sizes}: the model's own code fixes how many tokens there are.")
    inputs = inputs_of(m)
    for name in (*inputs.along, *inputs.whole):
        of_tokens(m, name)
    return inputs


def inputs_of(m: Match) -> TokenInputs:
    length, past = m.output.meta["val"].shape[1], earlier_keys(m)
    return find_token_inputs(m, length, None if past is None else length + past.meta["val"].shape[SEQUENCE_AXIS])


def earlier_keys(m: Match) -> fx.Node | None:
    """The input that holds keys of earlier calls, where the attention over the embedded tokens continues any.

    Raises:
        PeftGraphError: it does, and no such input does.
    """
    length = m.names[m.port("output")].meta["val"].shape[1]
    for core in m.related(attention.core & kind("self")):
        if "q" not in core.site.axes or "k" not in core.site.axes:
            continue
        queries, keys = (
            m.names[core.port(port)].meta["val"].shape[core.site.axes[port].positions] for port in ("q", "k")
        )
        if not same_size(queries, length) or same_size(keys, queries):
            continue
        for node in m.inputs:
            shape = node.meta["val"].shape
            if len(shape) == 4 and same_size(shape[SEQUENCE_AXIS], keys - queries):
                return node
        raise PeftGraphError(
            f"{core.site.id} reads {keys} keys for {queries} queries, and no input holds the others, so it is not "
            "known whether rows stand in front of them already. Trace the model without a cache."
        )
    return None


class Growth:
    """A sequence of tokens as it grows by L rows: the places of all calls so far, and the number of the row at each."""

    def __init__(self, m: Match, op: Builder, rows: int, after: int) -> None:
        self.rows, self.after = rows, after
        self.m, self.op, self.inputs, self._earlier = m, op, inputs_of(m), earlier_keys(m)

    def along(self) -> dict[str, fx.Node]:
        """The inputs of the call's tokens, longer, by their ports."""
        longer: dict[str, fx.Node] = {}
        for name in self.inputs.along:
            grown = self._grown(self.m.value(INPUT + name))
            if name in self.inputs.positions:
                grown = self.op.call(aten.add.Tensor, grown, self._of_call(self._shift()))
            longer[INPUT + name] = grown
        return longer

    def whole(self) -> dict[str, fx.Node]:
        """The inputs of the tokens of all calls, longer, by their ports."""
        given = {name: self.m.value(INPUT + name) for name in self.inputs.whole}
        source = self._source() if given else None
        return {INPUT + name: self._gathered(x, source) for name, x in given.items() if source is not None}

    def labels(self) -> dict[str, fx.Node]:
        """The labels, longer, by their ports."""
        longer: dict[str, fx.Node] = {}
        for name, ignored in self.inputs.labels:
            x = self.m.value(INPUT + name)
            blank = self._holds_row(self._for_batch(self._of_call(self._number()), x))
            longer[INPUT + name] = self.op.call(aten.masked_fill.Scalar, self._grown(x), blank, ignored)
        return longer

    def embedded(self, rows_LD: fx.Node) -> fx.Node:
        """The embedded tokens with the rows in their places."""
        op, x_BTD = self.op, self.m.output
        if self.inputs.mask is None:
            batch = op.call(aten.sym_size.int, x_BTD, 0)
            if self._earlier is not None:
                rows_LD = op.call(aten.slice.Tensor, rows_LD, 0, self._held(), END)
            rows_BLD = op.call(aten.expand.default, op.call(aten.unsqueeze.default, rows_LD, 0), [batch, -1, -1])
            ends = self._ends(x_BTD, 1)
            return op.call(aten.cat.default, [*ends[:-1], rows_BLD, ends[-1]], 1)
        number_BT = to_device_of(op, self._for_batch(self._of_call(self._number()), x_BTD), x_BTD)
        placed_BTD = op.call(aten.embedding.default, rows_LD, op.call(aten.clamp.default, number_BT, 0, self.rows - 1))
        inside_BT1 = op.call(aten.unsqueeze.default, self._holds_row(number_BT), -1)
        return op.call(aten.where.self, inside_BT1, placed_BTD, x_BTD)

    def cut(self, value: fx.Node, axis: int) -> fx.Node:
        """`value` without the rows' entries on an axis."""
        op, start = self.op, self._start()
        if start is None:
            ends = self._ends(value, axis)
            return ends[0] if len(ends) == 1 else op.call(aten.cat.default, ends, axis)
        if axis == 0:
            sizes = " x ".join(map(str, value.meta["val"].shape))
            raise PeftGraphError(
                f"A result has the tokens on its first axis, {sizes}, and the rows of each example stand at a place of "
                'their own, so it is not known where to cut. Choose returns="all".'
            )
        kept = self._upto(op.call(operator.sub, op.call(aten.sym_size.int, value, axis), self._added()), start)
        first = start if self._earlier is None else op.call(aten.sub.Scalar, start, self._before())
        behind = op.call(aten.mul.Scalar, op.call(aten.ge.Tensor, kept, first), self._added())
        index = op.call(aten.add.Tensor, kept, behind)
        for _ in range(axis - 1):
            index = op.call(aten.unsqueeze.default, index, 1)
        for _ in range(value.meta["val"].dim() - axis - 1):
            index = op.call(aten.unsqueeze.default, index, -1)
        return op.call(aten.take_along_dim.default, value, to_device_of(op, index, value), axis)

    # sizes: P places before the call, and of the L rows those that are added in it

    def _before(self) -> fx.Node:
        """P."""
        assert self._earlier is not None
        earlier = self.m.value(INPUT + self._earlier.name)
        return self._once("before", lambda: self.op.call(aten.sym_size.int, earlier, SEQUENCE_AXIS))

    def _added(self) -> fx.Node | int:
        """L in a first call, 0 in later ones: the rows behind the first P."""
        if self._earlier is None:
            return self.rows

        def added() -> fx.Node:
            return self.op.call(torch.sym_max, 0, self.op.call(operator.sub, self.rows, self._before()))

        return self._once("added", added)

    def _held(self) -> fx.Node:
        """How many of the P places hold rows; the others hold tokens."""
        return self._once("held", lambda: self.op.call(operator.sub, self.rows, self._added()))

    @property
    def _like(self) -> fx.Node:
        return self.m.value(INPUT + self.inputs.along[0])

    # places: j among all P + added + T of this call and earlier ones, and the number j - start of the row there

    def _start(self) -> fx.Node | None:
        """The place of the first row, (B, 1); None where it is `after` in every example."""
        mask = self.inputs.mask
        return None if mask is None else self._once("start", lambda: self._behind_padding(mask))

    def _behind_padding(self, mask: PaddingMask) -> fx.Node:
        op = self.op
        closed_BT = op.call(aten.eq.Scalar, op.call(aten.cumsum.default, read_token_mask(self.m, op, mask), 1), 0)
        inner_BT = op.call(aten.slice.Tensor, closed_BT, 1, 0, -1)  # an example of nothing but padding keeps one token
        padding_B1 = op.call(aten.sum.dim_IntList, inner_BT, [1], True)
        return op.call(aten.add.Scalar, padding_B1, self.after) if self.after else padding_B1

    def _number(self) -> fx.Node:
        """The number of the row at each place: negative before the rows, L and more behind them."""
        op, start = self.op, self._start()

        def number() -> fx.Node:
            count = op.call(operator.add, op.call(aten.sym_size.int, self._like, 1), self._added())
            if self._earlier is not None:
                count = op.call(operator.add, count, self._before())
            places = self._upto(count, self._like)
            if start is None:
                return op.call(aten.sub.Scalar, places, self.after) if self.after else places
            return op.call(aten.sub.Tensor, places, start)

        return self._once("number", number)

    def _shift(self) -> fx.Node:
        """How many places each place is behind the one it repeats: 0 before the rows, L behind them."""

        def shift() -> fx.Node:
            number = self._number()
            number = self.op.call(aten.add.Scalar, number, self.after) if self.after else number
            return self.op.call(aten.clamp.default, number, 0, self.rows)

        return self._once("shift", shift)

    def _source(self) -> fx.Node:
        """The token that each place repeats, counted over all calls."""

        def source() -> fx.Node:
            shift = self._shift()
            places = self._upto(self.op.call(aten.sym_size.int, shift, 1), shift)
            return self.op.call(aten.sub.Tensor, places, shift)

        return self._once("source", source)

    def _grown(self, x: fx.Node) -> fx.Node:
        """x (B, T) with the entry of the first token once more for every row that is added."""

        def source() -> fx.Node:
            if self._earlier is None:
                return self._source()
            earlier = self.op.call(operator.sub, self._before(), self._held())
            source = self.op.call(aten.sub.Scalar, self._of_call(self._source()), earlier)
            last = self.op.call(operator.sub, self.op.call(aten.sym_size.int, self._like, 1), 1)
            return self.op.call(aten.clamp.default, source, 0, last)  # an example may be padding up to this call

        return self._gathered(x, self._once("source of the call", source))

    def _of_call(self, x: fx.Node) -> fx.Node:
        """The places of this call, of all."""
        return x if self._earlier is None else self.op.call(aten.slice.Tensor, x, 1, self._before(), END)

    # small pieces

    def _once(self, name: str, build: Callable[[], fx.Node]) -> fx.Node:
        return self.op.shared_value(f"{self.m.site.id}.{name}", build)

    def _gathered(self, x: fx.Node, index: fx.Node) -> fx.Node:
        return self.op.call(aten.gather.default, x, 1, self._for_batch(index, x))

    def _ends(self, x: fx.Node, axis: int) -> list[fx.Node]:
        """What stands before the rows, if anything does, and behind them, where they start at `after`."""
        op, stop = self.op, self._added()
        if self.after:
            stop = op.call(operator.add, stop, self.after) if isinstance(stop, fx.Node) else stop + self.after
        behind = op.call(aten.slice.Tensor, x, axis, stop, END)
        return [op.call(aten.slice.Tensor, x, axis, 0, self.after), behind] if self.after else [behind]

    def _holds_row(self, number: fx.Node) -> fx.Node:
        first, last = self.op.call(aten.ge.Scalar, number, 0), self.op.call(aten.lt.Scalar, number, self.rows)
        return self.op.call(aten.logical_and.default, first, last)

    def _upto(self, size: fx.Node, like: fx.Node) -> fx.Node:
        """0, 1, ... size - 1, (1, size), on the device of `like`."""
        counted = self.op.call(aten.arange.default, size, device=like.meta["val"].device)
        return self.op.call(aten.unsqueeze.default, counted, 0)

    def _for_batch(self, index: fx.Node, like: fx.Node) -> fx.Node:
        """(1 or B, N) -> (B, N), B as `like` has it."""
        return self.op.call(aten.expand.default, index, [self.op.call(aten.sym_size.int, like, 0), -1])
