"""Rows in front of the tokens: the sequence grows where it is embedded, and what runs along it grows with it.

In a batch that is padded on the left, the rows of each example stand right in front of its first token, behind the
padding: distances between tokens and rows are those of the example alone. What the model gives for the rows is cut out
of its results, so that a call looks as it did before.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import fx

from peftgraph.errors import PeftGraphError
from peftgraph.ir.builder import Builder
from peftgraph.rewrite.inputs import Inputs, Mask, beside, inputs_along, same_size, tokens
from peftgraph.rewrite.match import INPUT, RESULT, Match
from peftgraph.rewrite.rule import Replace, Rule
from peftgraph.sites import attention, kind, ops
from peftgraph.sites.select import Selector

aten = torch.ops.aten
END = 2**63 - 1


@dataclass(frozen=True)
class Lengthening:
    """L rows in front of the tokens that a table lookup embeds.

    Shapes: B batch, T tokens, L rows, D features.

    Attributes:
        rows: L.
        after: how many tokens stay in front of the rows: 0, or 1 for a model that reads its answer at the first one.
    """

    rows: int
    after: int = 0

    def inputs(self, m: Match, op: Builder) -> dict[str, fx.Node]:
        """Every input that runs along the tokens, L longer, by its port.

        Of the rows is said what is said of the first token: its number, its type, that it is no padding. Positions
        count on, and labels are the value that the loss ignores.

        Args:
            m: the embedding of the tokens.
            op: the builder of the edit.

        Raises:
            PeftGraphError: the length is fixed, or an input runs along it in a form that rows do not fit in.
        """
        inputs = self._checked(m)
        longer: dict[str, fx.Node] = {}
        for name in inputs.along:
            x = m.value(INPUT + name)
            grown = self._grown(m, op, inputs, x)
            if name in inputs.positions:
                grown = op.call(aten.add.Tensor, grown, self._shift(m, op, inputs))
            longer[INPUT + name] = grown
        for name, ignored in inputs.labels:
            x = m.value(INPUT + name)
            blank = self._holds_row(op, self._for_batch(op, self._number(m, op, inputs), x))
            longer[INPUT + name] = op.call(aten.masked_fill.Scalar, self._grown(m, op, inputs, x), blank, ignored)
        return longer

    def embedded(self, m: Match, op: Builder, rows_LD: fx.Node) -> dict[str, fx.Node]:
        """The embedded sequence with the rows in their places, once the inputs are longer, by its port."""
        inputs, x_BTD = inputs_along(m, m.output.meta["val"].shape[1]), m.output
        if inputs.mask is None:
            batch = op.call(aten.sym_size.int, x_BTD, 0)
            rows_BLD = op.call(aten.expand.default, op.call(aten.unsqueeze.default, rows_LD, 0), [batch, -1, -1])
            ends = self._ends(op, x_BTD, 1)
            return {"output": op.call(aten.cat.default, [*ends[:-1], rows_BLD, ends[-1]], 1)}
        number_BT = beside(op, self._for_batch(op, self._number(m, op, inputs), x_BTD), x_BTD)
        placed_BTD = op.call(aten.embedding.default, rows_LD, op.call(aten.clamp.default, number_BT, 0, self.rows - 1))
        inside_BT1 = op.call(aten.unsqueeze.default, self._holds_row(op, number_BT), -1)
        return {"output": op.call(aten.where.self, inside_BT1, placed_BTD, x_BTD)}

    def results(self, m: Match, op: Builder) -> dict[str, fx.Node]:
        """What the model returns for each token, without what it gives for the rows, by its port.

        Raises:
            PeftGraphError: a result has the tokens on its first axis.
        """
        length = m.output.meta["val"].shape[1]
        inputs = inputs_along(m, length)
        shorter: dict[str, fx.Node] = {}
        for leaf in m.graph.output_node().all_input_nodes:
            base = m.names[m.edits.below(leaf.name)]
            sizes = base.meta["val"].shape if isinstance(base.meta["val"], torch.Tensor) else ()
            axes = [axis for axis, size in enumerate(sizes) if same_size(size, length)]
            value = m.value(RESULT + base.name)
            for axis in axes:
                value = self._cut(m, op, inputs, value, axis)
            if axes:
                shorter[RESULT + base.name] = value
        return shorter

    def _checked(self, m: Match) -> Inputs:
        shape = m.output.meta["val"].shape if m.has("output") else ()
        sizes = " x ".join(map(str, shape))
        if m.site.role != "embedding" or len(shape) != 3:
            raise PeftGraphError(
                f"{m.site.id} is no embedding of tokens (batch, tokens) but gives {sizes}; choose the one with at=."
            )
        if isinstance(shape[1], int):
            raise PeftGraphError(f"{m.site.id} gives {sizes}: the model's own code fixes how many tokens there are.")
        for core in m.related(attention.core & kind("self")):
            rows = "keys" if core.has("keys") else "k"  # k itself may stand transposed, where scores are written out
            queries, keys = (core.value(port).meta["val"].shape[-2] for port in ("q", rows))
            if same_size(queries, shape[1]) and not same_size(keys, queries):
                raise PeftGraphError(
                    f"{core.site.id} continues earlier calls, and rows would stand in front of each of them. Trace the "
                    "model without a cache; generation then reads the whole sequence at every step."
                )
        inputs = inputs_along(m, shape[1])
        for name in inputs.along:
            given = m.value(INPUT + name).meta["val"].shape
            if len(given) != 2:
                raise PeftGraphError(
                    f"The input {name} of {' x '.join(map(str, given))} runs along the tokens; only inputs (batch, "
                    "tokens) can be made longer. Trace the model with a mask of two dimensions, or without this input."
                )
        return inputs

    # places: j in the longer sequence of T + L, and the number j - start of the row that stands there

    def _start(self, m: Match, op: Builder, inputs: Inputs) -> fx.Node | None:
        """The place of the first row, (B, 1); None where it is `after` in every example."""
        mask = inputs.mask
        return None if mask is None else op.once(f"{m.site.id}.start", lambda: self._behind_padding(m, op, mask))

    def _behind_padding(self, m: Match, op: Builder, mask: Mask) -> fx.Node:
        closed_BT = op.call(aten.eq.Scalar, op.call(aten.cumsum.default, tokens(m, op, mask), 1), 0)
        inner_BT = op.call(aten.slice.Tensor, closed_BT, 1, 0, -1)  # an example of nothing but padding keeps one token
        padding_B1 = op.call(aten.sum.dim_IntList, inner_BT, [1], True)
        return op.call(aten.add.Scalar, padding_B1, self.after) if self.after else padding_B1

    def _number(self, m: Match, op: Builder, inputs: Inputs) -> fx.Node:
        """The number of the row at each place, (B, T + L): negative before the rows, L and more behind them."""
        start = self._start(m, op, inputs)

        def number() -> fx.Node:
            count = op.call(aten.sym_size.int, m.value(INPUT + inputs.along[0]), 1)
            places = self._upto(op, op.call(operator.add, count, self.rows), m.value(INPUT + inputs.along[0]))
            if start is None:
                return op.call(aten.sub.Scalar, places, self.after) if self.after else places
            return op.call(aten.sub.Tensor, places, start)

        return op.once(f"{m.site.id}.number", number)

    def _shift(self, m: Match, op: Builder, inputs: Inputs) -> fx.Node:
        """How many places each place is behind the one it repeats, (B, T + L): 0 before the rows, L behind them."""

        def shift() -> fx.Node:
            number = self._number(m, op, inputs)
            number = op.call(aten.add.Scalar, number, self.after) if self.after else number
            return op.call(aten.clamp.default, number, 0, self.rows)

        return op.once(f"{m.site.id}.shift", shift)

    def _grown(self, m: Match, op: Builder, inputs: Inputs, x: fx.Node) -> fx.Node:
        """x (B, T) with the entry of the first token L times more, (B, T + L)."""

        def source() -> fx.Node:
            shift = self._shift(m, op, inputs)
            return op.call(aten.sub.Tensor, self._upto(op, op.call(aten.sym_size.int, shift, 1), shift), shift)

        index = self._for_batch(op, op.once(f"{m.site.id}.source", source), x)
        return op.call(aten.gather.default, x, 1, index)

    def _cut(self, m: Match, op: Builder, inputs: Inputs, value: fx.Node, axis: int) -> fx.Node:
        """`value` without the rows' entries on an axis."""
        start = self._start(m, op, inputs)
        if start is None:
            ends = self._ends(op, value, axis)
            return ends[0] if len(ends) == 1 else op.call(aten.cat.default, ends, axis)
        if axis == 0:
            sizes = " x ".join(map(str, value.meta["val"].shape))
            raise PeftGraphError(
                f"A result has the tokens on its first axis, {sizes}, and the rows of each example stand at a place of "
                'their own, so it is not known where to cut. Choose returns="all".'
            )
        kept = self._upto(op, op.call(operator.sub, op.call(aten.sym_size.int, value, axis), self.rows), start)
        behind = op.call(aten.mul.Scalar, op.call(aten.ge.Tensor, kept, start), self.rows)
        index = op.call(aten.add.Tensor, kept, behind)
        for _ in range(axis - 1):
            index = op.call(aten.unsqueeze.default, index, 1)
        for _ in range(value.meta["val"].dim() - axis - 1):
            index = op.call(aten.unsqueeze.default, index, -1)
        return op.call(aten.take_along_dim.default, value, beside(op, index, value), axis)

    # small pieces

    def _ends(self, op: Builder, x: fx.Node, axis: int) -> list[fx.Node]:
        """What stands before the rows, if anything does, and behind them, where they start at `after`."""
        behind = op.call(aten.slice.Tensor, x, axis, self.after + self.rows, END)
        return [op.call(aten.slice.Tensor, x, axis, 0, self.after), behind] if self.after else [behind]

    def _holds_row(self, op: Builder, number: fx.Node) -> fx.Node:
        first, last = op.call(aten.ge.Scalar, number, 0), op.call(aten.lt.Scalar, number, self.rows)
        return op.call(aten.logical_and.default, first, last)

    @staticmethod
    def _upto(op: Builder, size: fx.Node, like: fx.Node) -> fx.Node:
        """0, 1, ... size - 1, (1, size), on the device of `like`."""
        return op.call(aten.unsqueeze.default, op.call(aten.arange.default, size, device=like.meta["val"].device), 0)

    @staticmethod
    def _for_batch(op: Builder, index: fx.Node, like: fx.Node) -> fx.Node:
        """(1 or B, N) -> (B, N), B as `like` has it."""
        return op.call(aten.expand.default, index, [op.call(aten.sym_size.int, like, 0), -1])


def embeds_tokens(m: Match) -> bool:
    """Whether a table lookup embeds the tokens of a sequence: not their positions, nor types of which there are few."""
    shape = m.output.meta["val"].shape
    if len(shape) != 3 or isinstance(shape[1], int):
        return False
    inputs = inputs_along(m, shape[1])
    source = m.value("input")
    while source.op == "call_function" and ops.name(source) in ops.LAYOUT | ops.CAST:
        source = source.all_input_nodes[0]
    name = m.edits.below(source.name)
    rows = {table: size for table, size in inputs.tables if table not in inputs.positions}
    return name in rows and (rows[name] >= m.example[name].shape[1] or rows[name] == max(rows.values()))


def lengthened(
    at: Selector, place: Lengthening, rows: Callable[[Match, Builder], fx.Node], reason: str, *, cut: bool
) -> list[Rule]:
    """The rules that put rows in front of the tokens that the sites at `at` embed.

    Args:
        at: embeddings.
        place: where, and how many.
        rows: builds the rows, (L, D).
        reason: why they do not fold.
        cut: whether the model's results are those of the tokens alone.
    """

    def inputs(m: Match, op: Builder) -> Mapping[str, fx.Node]:
        twins = [
            one.site.id
            for one in m.related(at)
            if embeds_tokens(one) and same_size(one.output.meta["val"].shape[1], m.output.meta["val"].shape[1])
        ]
        if len(twins) > 1:
            raise PeftGraphError(f"{' and '.join(twins)} embed one sequence of tokens; choose one of them with at=.")
        return place.inputs(m, op)

    def embedded(m: Match, op: Builder) -> Mapping[str, fx.Node]:
        values = place.embedded(m, op, rows(m, op))
        return values | place.results(m, op) if cut else values

    lacking = "embeds tokens that are an input of the model"
    more = {"at": at, "fold": reason, "where": embeds_tokens, "lacking": lacking, "level": 1}
    return [
        Rule(delta=inputs, join=Replace("input"), **more),
        Rule(delta=embedded, join=Replace(anew=False), **more),
    ]


def at_tokens(at: Selector, token: int, rows: Callable[[Match, Builder], fx.Node], reason: str) -> Rule:
    """The rule that embeds the k-th `token` of each example as the k-th row, and those beyond the last row as before.

    Args:
        at: embeddings.
        token: a number, which may lie beyond the table.
        rows: builds the rows, (L, D).
        reason: why they do not fold.
    """

    def placed(m: Match, op: Builder) -> Mapping[str, fx.Node]:
        rows_LD, tokens_BT = rows(m, op), m.input
        here_BT = op.call(aten.eq.Scalar, tokens_BT, token)
        number_BT = op.call(aten.sub.Scalar, op.call(aten.cumsum.default, here_BT, -1), 1)
        count = int(rows_LD.meta["val"].shape[0])
        here_BT = op.call(aten.logical_and.default, here_BT, op.call(aten.lt.Scalar, number_BT, count))
        row_BTD = op.call(aten.embedding.default, rows_LD, op.call(aten.clamp.default, number_BT, 0, count - 1))
        embedded = op.call(aten.where.self, op.call(aten.unsqueeze.default, here_BT, -1), row_BTD, m.output)
        size = m.shape[1]
        known = {"input": op.call(aten.clamp.default, tokens_BT, None, size - 1)} if token >= size else {}
        return known | {"output": embedded}

    lacking = "embeds tokens that are an input of the model"
    return Rule(
        at=at, delta=placed, join=Replace(anew=False), fold=reason, where=embeds_tokens, lacking=lacking, level=1
    )
