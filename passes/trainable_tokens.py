"""Trainable tokens (huggingface/peft, 2025): some rows of the token embedding train, all others stay unchanged.

    y = E[x]            ->   y = E'[x],  E' = E with the rows `tokens` in the place of its own
    y = h E^T (+ b)     ->   y with h (tokens - E_N)^T added on the columns of these tokens, E_N the base's own rows
    fold: E <- E'                                                        (every other row keeps every bit)

This trains new tokens of a resized vocabulary, or existing ones with a new meaning; the model is otherwise frozen or
has any other adapter, which then also applies to the new rows. The rows start as the base's, so that a fresh pass is
the identity. All readers of the table use them: the stacks that share it, and a tied head, which therefore stays
tied after folding. For a head that is not tied, at="head" trains its rows alone. The token lookup is identified in
the graph: position ids count, and token types are fewer. As in the model itself, the padding row gets no gradient
from its lookup.
Shapes: V tokens in the table, D features, N trained tokens. E (V, D); tokens and E_N (N, D).
Source: huggingface/peft 0.21, tuners/trainable_tokens/layer.py, which recomputes all of E' in each forward.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

import peftgraph as pg
from peftgraph.authoring import Builder, Match, Nesting, ParameterValue, Params, Pass, Replace, Rule
from peftgraph.authoring.sequence import is_token_embedding

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class TrainableTokens(Pass):
    """Trains the embedding rows of some tokens.

    Attributes:
        tokens: the ids of the tokens, which are the indices of their rows.
        at: the embedding of tokens; or the head, where it has a table of its own.
    """

    word = "trainable_tokens"
    tokens: tuple[int, ...]
    at: pg.Selector = pg.embedding

    def check(self) -> None:
        """Refuse an empty list of tokens, negative tokens and repeated ones."""
        object.__setattr__(self, "tokens", tuple(self.tokens))
        self.require(bool(self.tokens), "tokens must name at least one token.")
        wrong = next((one for one in self.tokens if isinstance(one, bool) or not isinstance(one, int) or one < 0), None)
        self.require(wrong is None, f"a token is a whole number from 0 on, got {wrong!r}.")
        twice = next((one for one in self.tokens if self.tokens.count(one) > 1), None)
        self.require(twice is None, f"token {twice} is named twice.")

    def rules(self) -> list[Rule]:
        """Put the rows in the place of the table's own, wherever the table is read."""
        others = (pg.embedding | pg.head | pg.projection) & ~self.at
        where_message = "embeds the tokens of a sequence, nor is it an output head"
        return [
            self.rule(at=self.at, where=self.names_tokens, where_message=where_message),
            self.rule(at=others, where=lambda m: any(map(m.shares_weight, self.chosen(m))), optional=True),
        ]

    def rule(self, **more: Any) -> Rule:
        """Return one of the two rules, at the level below all other passes at the same sites."""
        join = Replace(exclusive=False)
        rows = {"table_rows": self.tokens, "max_rank": len(self.tokens), "nesting": Nesting.INNERMOST}
        return Rule(delta=self.delta, fold=self.fold, join=join, **rows, **more)

    def names_tokens(self, m: Match) -> bool:
        """Tell whether the rows of a site's table belong to tokens."""
        embeds = m.site.role == "embedding" and is_token_embedding(m, self.at)
        return embeds or (m.site.role == "head" and m.site.columns is None)

    def chosen(self, m: Match) -> list[Match]:
        """Return the embedding sites that the pass applies to."""
        return [one for one in m.related(self.at) if self.names_tokens(one)]

    def delta(self, m: Match, op: Builder) -> fx.Node:
        """Return the value with the trained rows in place of the stored ones."""
        self.fits(m)
        base = m.rows(self.tokens)
        rows_ND = op.shared_param("tokens", base.value.shape, lambda rows: rows.copy_(base.value))
        if m.site.role == "embedding":
            return self.embedded(m, op, rows_ND)
        change_ND = op.call(aten.sub.Tensor, rows_ND, m.read(op, base))
        low = m.down(op, m.input, change_ND)
        return m.on_columns(op, m.output, lambda part: op.add(part, low), base.view.window)

    def embedded(self, m: Match, op: Builder, rows_ND: fx.Node) -> fx.Node:
        """E'[x]: the k-th row for the k-th token, and E[x] for the others, which are numbered -1."""
        slots_V1 = torch.full((m.shape[1], 1), -1)
        slots_V1[list(self.tokens), 0] = torch.arange(len(self.tokens))
        slot_BT1 = op.call(aten.embedding.default, op.constant("slots", slots_V1), m.input)
        slot_BT = op.call(aten.clamp.default, op.call(aten.squeeze.dim, slot_BT1, -1), 0)
        padding = [self.tokens.index(one) for one in m.names[m.site.op].args[2:3] if one in self.tokens]
        row_BTD = op.call(aten.embedding.default, rows_ND, slot_BT, *padding)
        return op.call(aten.where.self, op.call(aten.ge.Scalar, slot_BT1, 0), row_BTD, m.output)

    def fits(self, m: Match) -> None:
        """Refuse tokens outside the table or in another pass, and sites that do not share one table."""
        apart = next((one for one in self.chosen(m) if not m.shares_weight(one)), None)
        self.require(
            apart is None,
            f"{m.site} and {apart and apart.site} have tables of their own. Choose one with at=, and give each other "
            'one a pass with a name="..." of its own.',
        )
        out, inner = m.shape
        size = inner if m.site.role == "embedding" else out
        beyond = next((one for one in self.tokens if one >= size), None)
        self.require(
            beyond is None,
            f"token {beyond} is outside of the table of {m.site}, whose tokens are 0 to {size - 1}. Where the "
            "vocabulary was resized, resize the model before it is traced.",
        )
        for edit in m.edits:
            other = m.history[edit.application].method
            if edit.site == m.site.id and isinstance(other, TrainableTokens):
                both = next((one for one in self.tokens if one in other.tokens), None)
                if both is not None:
                    raise pg.Conflict(f"{self} and {other} both train token {both} (at {m.site.id}). Choose one.")

    def fold(self, m: Match, p: Params) -> Mapping[ParameterValue, Tensor]:
        """Return the trained rows, which replace those of the table."""
        return {m.rows(self.tokens): p.tokens}
