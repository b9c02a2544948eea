"""Invertible adapters (MAD-X, Pfeiffer et al., 2020): transformed token embeddings, inverted before the head.

    e = [e1; e2]   ->   o = [e1 + F(e2); e2 + G(o1)]               before the blocks
    o = [o1; o2]   ->   e = [o1 - F(e2); e2],  e2 = o2 - G(o1)     before the head
    no fold: F and G are nonlinear, so no weight can express it

e is the embedded tokens as the first block reads them, and o in the second line the input of the output embedding.
F(x) = W_up act(W_down x + b_down) + b_up, and G likewise; both directions share them. The output embedding is the
head that is tied to the table of tokens, or has a row of that width for each token; before other heads nothing is
inverted. The embeddings are complete: in BERT with positions, types, norm and dropout, in Llama the lookup alone.
Where blocks are wider than the embeddings, both transformations are in the embeddings' width. In an encoder-decoder
the decoder's embeddings are unchanged, as in the adapters library; at="embedding" changes them as well. In MAD-X a
language also has a Pfeiffer adapter of half the width, and the task another one.
Shapes: E width of the embeddings, e1 (..., E // 2), e2 the rest; F and G are narrow by `reduction`. Weights are
normal with std 0.02 and biases zero, as in the authors' library, so a fresh pass is not the identity;
init="identity" starts W_up at zero.
Source: arXiv 2005.00052, invertible adapters; adapter-hub/adapters, methods/modeling.py, NICECouplingBlock.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import fx

import peftgraph as pg
from peftgraph.authoring import ACTIVATIONS, Builder, Match, Nesting, Pass, Replace, Rule, omit_default
from peftgraph.authoring.modules import init
from peftgraph.authoring.sequence import embedding_output_port, is_token_embedding

aten = torch.ops.aten

UP = {"bert": init.normal(0.02), "identity": init.zeros}


@dataclass(frozen=True, kw_only=True)
class Invertible(Pass):
    """An additive coupling of the two halves of every token embedding, and its inverse.

    Attributes:
        at: embeddings of tokens.
        reduction: how many times narrower the bottlenecks of F and G are than their inputs.
        activation: a word of `peftgraph.authoring.ACTIVATIONS`.
        init: how W_up starts: "bert" (normal, std 0.02) or "identity" (zero).
        inverse: whether the output embedding reads the inverse.
    """

    word = "invertible"
    at: pg.Selector = pg.embedding & ~pg.stack("decoder")
    reduction: float = omit_default(2.0)
    activation: str = omit_default("relu")
    init: Literal["bert", "identity"] = omit_default("bert")
    inverse: bool = omit_default(True)

    def check(self) -> None:
        """Refuse a reduction that is no factor of the width, and unknown words."""
        self.require(self.reduction > 0, f"reduction must be above 0, got {self.reduction}.")
        self.require_one_of("activation", ACTIVATIONS)
        self.require_one_of("init", UP)

    def rules(self) -> list[Rule]:
        """Couple the finished embeddings; take that back before the output embedding, where there is one."""
        reason = "it is nonlinear, so no weight can express it"
        where_message = "embeds the tokens of a sequence"
        there = Rule(
            at=self.at,
            delta=self.coupled,
            join=Replace(exclusive=False),
            fold=reason,
            where=partial(is_token_embedding, at=self.at),
            where_message=where_message,
            nesting=Nesting.OUTERMOST,
        )
        back = Rule(
            at=pg.head | pg.projection,
            delta=self.uncoupled,
            join=Replace("input", exclusive=False),
            fold=reason,
            where=self.gives_tokens,
            optional=True,
        )
        return [there, back] if self.inverse else [there]

    def tables(self, m: Match) -> list[Match]:
        """Return the token embedding tables whose output is transformed."""
        return [one for one in m.related(self.at) if is_token_embedding(one, self.at)]

    def gives_tokens(self, m: Match) -> bool:
        """Tell whether a projection is an output embedding: it shares a table's weight or has its shape."""
        tables = self.tables(m) if m.site.columns is None else []
        return any(m.shares_weight(one) or m.shape == one.shape[::-1] for one in tables)

    def coupled(self, m: Match, op: Builder) -> Mapping[str, fx.Node]:
        """Return [e1 + F(e2); e2 + G(o1)]."""
        port, tables = embedding_output_port(m), self.tables(m)
        widths = {one.shape[0] for one in tables}
        self.require(len(widths) == 1, f"F and G have one width, and the embeddings have {sorted(widths)}. Choose one.")
        twins = [one.site.id for one in tables if embedding_output_port(one) == port]
        self.require(len(twins) == 1, f"{' and '.join(twins)} embed one sequence of tokens; choose one with at=.")
        e1, e2 = self.halves(op, m.value(port))
        o1 = op.add(e1, self.shift(op, "f", e2, e1))
        return {port: op.call(aten.cat.default, [o1, op.add(e2, self.shift(op, "g", o1, e2))], -1)}

    def uncoupled(self, m: Match, op: Builder) -> fx.Node:
        """Return [o1 - F(e2); o2 - G(o1)]."""
        for edit in m.edits:
            other, here = m.history[edit.application].method, edit.site == m.site.id
            if here and isinstance(other, Invertible):
                raise pg.Conflict(
                    f"{m.site.id} would take back {other} and {self} in a wrong order. Apply one of them."
                )
            if here and any(m.names[name] in m.input.users for name in edit.nodes):
                raise pg.Conflict(
                    f"{other} reads what {m.site.id} reads, so that {self} cannot change it any more. Apply "
                    f"{self.word} first."
                )
        o1, o2 = self.halves(op, m.input)
        e2 = op.call(aten.sub.Tensor, o2, self.shift(op, "g", o1, o2))
        return op.call(aten.cat.default, [op.call(aten.sub.Tensor, o1, self.shift(op, "f", e2, o1)), e2], -1)

    def halves(self, op: Builder, x: fx.Node) -> tuple[fx.Node, fx.Node]:
        """Split the features in two; where their number is odd, the second part has one more."""
        width = int(x.meta["val"].shape[-1])
        return op.call(aten.slice.Tensor, x, -1, 0, width // 2), op.call(aten.slice.Tensor, x, -1, width // 2, width)

    def shift(self, op: Builder, name: str, x: fx.Node, like: fx.Node) -> fx.Node:
        """F or G of one part of the features, as wide as the other."""
        inner, out = (int(one.meta["val"].shape[-1]) for one in (x, like))
        width = int(inner // self.reduction)
        self.require(width >= 1, f"reduction={self.reduction} leaves nothing of {inner} features.")
        down_MI = op.shared_param(f"{name}_down_weight", (width, inner), init.normal(0.02))
        down_M = op.shared_param(f"{name}_down_bias", (width,), init.zeros)
        up_OM = op.shared_param(f"{name}_up_weight", (out, width), UP[self.init])
        up_O = op.shared_param(f"{name}_up_bias", (out,), init.zeros)
        return op.linear(op.activation(self.activation, op.linear(x, down_MI, down_M)), up_OM, up_O)
