"""Rows prepended to a sequence, as rules: among its tokens, after their embedding, or before the first block.

Each of the three makes the sequence longer at one point, and takes what the model gives for the rows out of its
results, so that a call looks as it did before:

- among the tokens: every input that runs along them has entries for the rows, and these are written over what the
  entries are embedded as. In a batch that is padded on the left, the rows of each example stand right before its first
  token, after the padding: distances between tokens and rows are those of the example alone;
- after the embedding: the finished embeddings stay as they are, and what is read after them follows longer inputs;
- before the first block, where nothing embeds tokens: the longer axis is followed through all that depends on it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx

from peftgraph.errors import PeftGraphError
from peftgraph.ir.builder import Builder
from peftgraph.rewrite.joins import Replace
from peftgraph.rewrite.match import Match
from peftgraph.rewrite.nesting import Nesting
from peftgraph.rewrite.rule import Rule
from peftgraph.rewrite.sequence.after_embedding import cut_after_embedding, insert_after_embedding
from peftgraph.rewrite.sequence.axes import same_size
from peftgraph.rewrite.sequence.before_first_block import insert_before_block, is_first_block_without_embedding
from peftgraph.rewrite.sequence.prepended_rows import PrependedRows
from peftgraph.rewrite.sequence.token_embedding import cached_keys, embeds_input_tokens, token_inputs_of
from peftgraph.sites.selectors.selector import Selector

aten = torch.ops.aten


@dataclass(frozen=True)
class PrependTokens:
    """L rows before the tokens that a table lookup embeds.

    A graph that continues earlier calls has them in the first one, whose keys and values it passes on: of L rows, a
    call adds those that P earlier positions do not hold yet.

    Attributes:
        rows: L.
        start: how many tokens stay before the rows: 0, or 1 for a model that reads its answer at the first one.
        after_embedding: whether the rows come after the finished embeddings, without positions, types or a norm of
            theirs; the tokens then keep their positions, and the rows are before padding as well.
    """

    rows: int
    start: int = 0
    after_embedding: bool = False


def prepend_token_rules(
    at: Selector, place: PrependTokens, rows: Callable[[Match, Builder], fx.Node], reason: str, *, trim_results: bool
) -> list[Rule]:
    """Return the rules that prepend rows to the tokens that the sites at `at` embed.

    Args:
        at: embeddings, or the first blocks of stacks that none feeds.
        place: where, and how many.
        rows: builds the rows, (L, D).
        reason: why they do not fold.
        trim_results: whether the model's results are those of the tokens alone.
    """
    build = _after_embedding_rules if place.after_embedding else _among_tokens_rules
    return build(at, place, rows, reason, trim_results)


Rows = Callable[[Match, Builder], fx.Node]


@dataclass(frozen=True)
class RowsByExample:
    """Says how examples of one batch have rows of their own.

    Attributes:
        rows: builds the rows, (M, L, D).
        example: builds which of the M each example has, (B,).
        lengths: builds how many of the L rows each example has, (B, 1).
    """

    rows: Rows
    example: Rows
    lengths: Rows


EMBEDS = "embeds tokens that are an input of the model"


def rows_by_example_rules(
    at: Selector, place: PrependTokens, rows: RowsByExample, reason: str, *, trim_results: bool
) -> list[Rule]:
    """Return the rules that prepend rows of its own to the tokens of each example; arguments as `prepend_token_rules`.

    Examples with fewer rows than L have positions behind their last token, which are hidden; so the positions of all
    others are those of the example alone.
    """
    return _among_tokens_rules(at, place, rows, reason, trim_results)


def _among_tokens_rules(
    at: Selector, place: PrependTokens, rows: Rows | RowsByExample, reason: str, trim_results: bool
) -> list[Rule]:
    own = rows if isinstance(rows, RowsByExample) else None
    shared = None if isinstance(rows, RowsByExample) else rows

    def plan(m: Match, op: Builder) -> PrependedRows:
        inputs, keys = token_inputs_of(m), cached_keys(m)
        if own is not None and keys is not None:
            raise PeftGraphError(
                "Rows of their own in examples of one batch cannot be in a cache of keys and values; trace the model "
                "without use_cache=True."
            )
        lengths = None if own is None else op.shared_value("lengths", partial(own.lengths, m, op))
        return PrependedRows(
            m, op, place.rows, place.start, inputs, skips_padding=True, cached_keys=keys, lengths=lengths
        )

    def lengthen_inputs(m: Match, op: Builder) -> Mapping[str, fx.Node]:
        _check_one_embedding(m, at)
        return plan(m, op).all_inputs()

    def write_rows(m: Match, op: Builder) -> Mapping[str, fx.Node]:
        prepended, length = plan(m, op), m.output.meta["val"].shape[1]
        if own is not None:
            written = prepended.overwrite(m.output, own.rows(m, op), own.example(m, op))
        else:
            assert shared is not None
            written = prepended.overwrite(m.output, shared(m, op))
        embedded = {"output": written}
        return embedded | prepended.cut_results(length) if trim_results else embedded

    options: dict[str, Any] = {"at": at, "fold": reason, "nesting": Nesting.SUBLAYER}
    options |= {"where": partial(embeds_input_tokens, at=at), "where_message": EMBEDS}
    return [
        Rule(delta=lengthen_inputs, join=Replace("input", resizes=True), **options),
        Rule(delta=write_rows, join=Replace(exclusive=False, resizes=True), **options),
    ]


def _after_embedding_rules(
    at: Selector, place: PrependTokens, rows: Rows, reason: str, trim_results: bool
) -> list[Rule]:
    def insert_rows(m: Match, op: Builder) -> Mapping[str, fx.Node]:
        if m.site.role == "block":
            return insert_before_block(m, op, rows(m, op), place.start, trim_results)
        _check_one_embedding(m, at)
        return insert_after_embedding(m, op, rows(m, op), place.start)

    def cut_results(m: Match, op: Builder) -> Mapping[str, fx.Node]:
        return cut_after_embedding(m, op, place.rows, place.start)

    embeds = partial(embeds_input_tokens, at=at)
    options: dict[str, Any] = {"at": at, "fold": reason, "nesting": Nesting.OUTERMOST}
    options["where_message"] = f"{EMBEDS}, or is the first block of a stack that no embedding feeds"
    insert = Rule(
        delta=insert_rows,
        join=Replace("input", resizes=True),
        where=lambda m: embeds(m) or is_first_block_without_embedding(m),
        **options,
    )
    join = Replace(exclusive=False, resizes=True)
    cut = Rule(delta=cut_results, join=join, where=embeds, optional=True, **options)
    return [insert, cut] if trim_results else [insert]


def _check_one_embedding(m: Match, at: Selector) -> None:
    """Refuse one table that several inputs of one sequence look up."""
    twins = [
        one.site.id
        for one in m.related(at)
        if embeds_input_tokens(one, at) and same_size(one.output.meta["val"].shape[1], m.output.meta["val"].shape[1])
    ]
    if len(twins) > 1:
        raise PeftGraphError(f"{' and '.join(twins)} embed one sequence of tokens; choose one of them with at=.")


def replace_token_rule(at: Selector, token: int, rows: Callable[[Match, Builder], fx.Node], reason: str) -> Rule:
    """Return the rule that embeds the k-th `token` of each example as the k-th row, and those beyond the last row as
    before.

    Args:
        at: embeddings.
        token: a number, which may lie beyond the table.
        rows: builds the rows, (L, D).
        reason: why they do not fold.
    """

    def replace_tokens(m: Match, op: Builder) -> Mapping[str, fx.Node]:
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

    return Rule(
        at=at,
        delta=replace_tokens,
        join=Replace(exclusive=False),
        fold=reason,
        where=partial(embeds_input_tokens, at=at),
        where_message=EMBEDS,
        nesting=Nesting.SUBLAYER,
    )
