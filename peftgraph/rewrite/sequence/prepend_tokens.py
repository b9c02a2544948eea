"""Rows in front of the tokens: the sequence grows where it is embedded, and what runs along it grows with it.

Where nothing embeds tokens, in a model of pictures, rows go in front of what the first block reads.

In a batch that is padded on the left, the rows of each example stand right in front of its first token, behind the
padding: distances between tokens and rows are those of the example alone. What the model gives for the rows is cut out
of its results, so that a call looks as it did before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from peftgraph.errors import PeftGraphError
from peftgraph.ir.builder import Builder
from peftgraph.rewrite.joins import Replace
from peftgraph.rewrite.match import RESULT, Match
from peftgraph.rewrite.nesting import Nesting
from peftgraph.rewrite.rule import Rule
from peftgraph.rewrite.sequence.after_embedding import Behind
from peftgraph.rewrite.sequence.before_first_block import InFront, is_first_block_without_embedding
from peftgraph.rewrite.sequence.growth import Growth, checked_inputs
from peftgraph.rewrite.sequence.token_inputs import find_token_inputs, same_size
from peftgraph.sites.dataflow import ops
from peftgraph.sites.selectors.selector import Selector

aten = torch.ops.aten


@dataclass(frozen=True)
class PrependTokens:
    """L rows in front of the tokens that a table lookup embeds.

    A graph that continues earlier calls puts them in front of the first one, whose keys and values it passes on: of L
    rows, those that P earlier places do not hold yet. Shapes: B batch, T tokens, L rows, D features.

    Attributes:
        rows: L.
        start: how many tokens stay in front of the rows: 0, or 1 for a model that reads its answer at the first one.
        after_embedding: whether the rows stand behind the finished embeddings, without positions, types or a norm of
            theirs; the tokens then keep their positions, and the rows are in front of padding as well.
    """

    rows: int
    start: int = 0
    after_embedding: bool = False

    def inputs(self, m: Match, op: Builder) -> dict[str, fx.Node]:
        """Every input that runs along the tokens, longer by the rows, by its port.

        Of the rows is said what is said of the first token: its number, its type, that it is no padding. Positions
        count on, and labels are the value that the loss ignores.

        Args:
            m: the embedding of the tokens.
            op: the builder of the edit.

        Raises:
            PeftGraphError: the length is fixed, or an input runs along it in a form that rows do not fit in.
        """
        checked_inputs(m)
        growth = Growth(m, op, self.rows, self.start)
        return growth.whole() | growth.along() | growth.labels()

    def embedded(self, m: Match, op: Builder, rows_LD: fx.Node) -> dict[str, fx.Node]:
        """The embedded sequence with the rows in their places, once the inputs are longer, by its port."""
        return {"output": Growth(m, op, self.rows, self.start).embedded(rows_LD)}

    def results(self, m: Match, op: Builder) -> dict[str, fx.Node]:
        """What the model returns for each token, without what it gives for the rows, by its port.

        Raises:
            PeftGraphError: a result has the tokens on its first axis.
        """
        growth, length = Growth(m, op, self.rows, self.start), m.output.meta["val"].shape[1]
        shorter: dict[str, fx.Node] = {}
        for leaf in m.graph.output_node().all_input_nodes:
            base = m.names[m.edits.base_value(leaf.name)]
            sizes = base.meta["val"].shape if isinstance(base.meta["val"], torch.Tensor) else ()
            axes = [axis for axis, size in enumerate(sizes) if same_size(size, length)]
            value = m.value(RESULT + base.name)
            for axis in axes:
                value = growth.cut(value, axis)
            if axes:
                shorter[RESULT + base.name] = value
        return shorter


def embeds_tokens(m: Match) -> bool:
    """Whether a table lookup embeds the tokens of a sequence: not their positions, nor types of which there are few."""
    shape = m.output.meta["val"].shape
    if m.site.role != "embedding" or len(shape) != 3 or isinstance(shape[1], int):
        return False
    inputs = find_token_inputs(m, shape[1])
    source = m.value("input")
    while source.op == "call_function" and ops.name(source) in ops.LAYOUT | ops.CAST:
        source = source.all_input_nodes[0]
    name = m.edits.base_value(source.name)
    rows = {table: size for table, size in inputs.tables if table not in inputs.positions}
    return name in rows and (rows[name] >= m.example[name].shape[1] or rows[name] == max(rows.values()))


def prepend_token_rules(
    at: Selector, place: PrependTokens, rows: Callable[[Match, Builder], fx.Node], reason: str, *, trim_results: bool
) -> list[Rule]:
    """The rules that put rows in front of the tokens that the sites at `at` embed.

    Args:
        at: embeddings, or the first blocks of stacks that none feeds.
        place: where, and how many.
        rows: builds the rows, (L, D).
        reason: why they do not fold.
        trim_results: whether the model's results are those of the tokens alone.
    """

    def inputs(m: Match, op: Builder) -> Mapping[str, fx.Node]:
        _check_alone(m, at)
        return place.inputs(m, op)

    def behind(m: Match, op: Builder) -> Mapping[str, fx.Node]:
        if m.site.role == "block":
            return InFront(m, op, place.rows, place.start).inserted(rows(m, op), trim_results)
        _check_alone(m, at)
        return Behind(m, op, place.rows, place.start).inserted(rows(m, op))

    def results_behind(m: Match, op: Builder) -> Mapping[str, fx.Node]:
        return Behind(m, op, place.rows, place.start).results()

    def embedded(m: Match, op: Builder) -> Mapping[str, fx.Node]:
        values = place.embedded(m, op, rows(m, op))
        return values | place.results(m, op) if trim_results else values

    message = "embeds tokens that are an input of the model"
    nesting = Nesting.OUTERMOST if place.after_embedding else Nesting.SUBLAYER
    more: dict[str, Any] = {
        "at": at,
        "fold": reason,
        "where": embeds_tokens,
        "where_message": message,
        "nesting": nesting,
    }
    if place.after_embedding:
        message += ", or is the first block of a stack that no embedding feeds"
        more |= {"where": lambda m: embeds_tokens(m) or is_first_block_without_embedding(m), "where_message": message}
        found = [Rule(delta=behind, join=Replace("input", resizes=True), **more)]
        more |= {"where": embeds_tokens, "optional": True}
        cutting = Rule(delta=results_behind, join=Replace(exclusive=False, resizes=True), **more)
        return [*found, cutting] if trim_results else found
    return [
        Rule(delta=inputs, join=Replace("input", resizes=True), **more),
        Rule(delta=embedded, join=Replace(exclusive=False, resizes=True), **more),
    ]


def _check_alone(m: Match, at: Selector) -> None:
    twins = [
        one.site.id
        for one in m.related(at)
        if embeds_tokens(one) and same_size(one.output.meta["val"].shape[1], m.output.meta["val"].shape[1])
    ]
    if len(twins) > 1:
        raise PeftGraphError(f"{' and '.join(twins)} embed one sequence of tokens; choose one of them with at=.")


def replace_token_rule(at: Selector, token: int, rows: Callable[[Match, Builder], fx.Node], reason: str) -> Rule:
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

    message = "embeds tokens that are an input of the model"
    return Rule(
        at=at,
        delta=placed,
        join=Replace(exclusive=False),
        fold=reason,
        where=embeds_tokens,
        where_message=message,
        nesting=Nesting.SUBLAYER,
    )
