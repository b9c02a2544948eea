"""Prefix tuning (Li and Liang, 2021): trainable keys and values that every query of an attention also attends to.

    head = softmax(q K^T + mask) V   ->   softmax(q [P_K; K]^T + [0, mask]) [P_V; V]
         = (1 - a) head + a softmax(q P_K^T) P_V,   a the share of the exponentials that falls on the prefix
    no fold: the prefix is attended to, and no weight stores rows of keys or values

In training an MLP computes the prefix: [P_K, P_V] = W_up tanh(W_down P' + b_down) + b_up, with P' and the first
layer shared by all attentions of one kind: encoder, decoder and cross-attention have one each. `finalize()` replaces
the MLP by its results. hidden=none trains P_K and P_V themselves: P-tuning v2 (and what peft does by default). The
prefix has no position: queries and keys keep theirs, and no rotary embedding or position bias applies to it. peft
passes it as a cache of earlier tokens and so counts positions from L on: pass position_ids from L on for that. Where
the model adds relative position biases, as T5 does, they apply to peft's prefix as to L more tokens: placed=true. In
T5 under the adapters library, positions of keys are shifted by L, and those of queries are not: key j of [P_K; K]
has the bias b(j - i) for query i, on rows and tokens alike, biases="shifted". In layers above one without a prefix,
whose biases they would share, it adds none: biases="dropped".
Shapes: L length, D the width of the model, M hidden, G heads of keys and values, F features of one, P' (L, D),
W_down (M, D), W_up (2 G F, M): the sites' W_up are the rows of the paper's one matrix. P_K and P_V (L, G F). P', and
P_K and P_V without the MLP, start standard normal, as torch.nn.Embedding does, and the layers as torch.nn.Linear.
Source: arXiv 2101.00190, sections 4 and 5; XiangLi1999/PrefixTuning, gpt2/train_control.py. arXiv 2110.07602
(P-tuning v2). The second form of the algebra: arXiv 2110.04366, equation 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from torch import fx

import peftgraph as pg
from peftgraph.authoring import Builder, Match, Pass, Rule, omit_default
from peftgraph.authoring.attention import PrependKV, key_head_shape, value_head_shape
from peftgraph.authoring.modules import init

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class Prefix(Pass):
    """Rows of keys and values prepended to an attention's own.

    Attributes:
        at: attention cores; all of them by default.
        length: L, how many rows (10 in the authors' code, 5 in its examples).
        hidden: M of the MLP (512 for table-to-text, 800 for summarisation); none trains the rows themselves.
        dropout: on the rows, in training (P-tuning v2's code uses the model's own; prefix tuning none).
        placed: whether the model's masks and relative position biases apply to the rows as to L preceding tokens.
        biases: for trained relative position biases: the tokens' own are "kept", keys are "shifted" by L, or all are
            "dropped".
    """

    word = "prefix"
    at: pg.Selector = pg.attention.core
    length: int = 10
    hidden: int | None = 512
    dropout: float = 0.0
    placed: bool = omit_default(False)
    biases: Literal["kept", "shifted", "dropped"] = omit_default("kept")

    def check(self) -> None:
        """Refuse sizes below 1, a dropout outside [0, 1), and two ways to place the rows at once."""
        self.require(self.length >= 1, f"length must be at least 1, got {self.length}.")
        self.require(self.hidden is None or self.hidden >= 1, f"hidden must be at least 1 or none, got {self.hidden}.")
        self.require(0 <= self.dropout < 1, f"dropout must be in [0, 1), got {self.dropout}.")
        self.require_one_of("biases", ("kept", "shifted", "dropped"))
        self.require(not self.placed or self.biases == "kept", "placed=true says already where biases fall.")

    def rules(self) -> list[Rule]:
        """Return one rule: prepend the rows to the keys and values."""
        reason = "the prefix is attended to, and no weight stores rows of keys or values"
        join = PrependKV(placed=self.placed, biases=self.biases)
        return [Rule(at=self.at, delta=self.delta, join=join, fold=reason, gate_input=self.attended)]

    def finalized(self) -> Self:
        """Return the same prefix without the MLP."""
        return replace(self, hidden=None)

    def delta(self, m: Match, op: Builder) -> dict[str, fx.Node]:
        """P_K and P_V by head, (1, G, L, F)."""
        sizes = {"prefix_k": key_head_shape(m), "prefix_v": value_head_shape(m)}
        rows = self.direct(op, sizes) if self.hidden is None else self.projected(m, op, sizes)
        by_head: dict[str, fx.Node] = {}
        for port, name in (("keys", "prefix_k"), ("values", "prefix_v")):
            heads, features = sizes[name]
            dropped = op.dropout(rows[name], self.dropout)
            apart_1LGF = op.call(aten.view.default, dropped, [1, self.length, heads, features])
            by_head[port] = op.call(aten.transpose.int, apart_1LGF, 1, 2)
        return by_head

    def direct(self, op: Builder, sizes: Mapping[str, tuple[int, int]]) -> dict[str, fx.Node]:
        """P_K and P_V, (L, G F) each, as parameters."""
        return {name: op.param(name, (self.length, g * f), init.normal(1.0)) for name, (g, f) in sizes.items()}

    def projected(self, m: Match, op: Builder, sizes: Mapping[str, tuple[int, int]]) -> dict[str, fx.Node]:
        """P_K and P_V, (L, G F) each, out of the MLP of the site's kind."""
        assert self.hidden is not None
        family = "_".join(part for part in (m.site.stack, m.site.kind) if part)
        width = self.width(m)

        def hidden() -> fx.Node:
            start_LD = op.shared_param(f"{family}_embedding", (self.length, width), init.normal(1.0))
            weight = op.shared_param(f"{family}_down_weight", (self.hidden or 0, width), init.kaiming)
            bias = op.shared_param(f"{family}_down_bias", (self.hidden or 0,), init.uniform(width**-0.5))
            return op.activation("tanh", op.linear(start_LD, weight, bias))

        hidden_LM = op.shared_value(f"{family}_hidden", hidden)
        found: dict[str, fx.Node] = {}
        for name, (heads, features) in sizes.items():
            weight = op.param(f"{name[-1]}_weight", (heads * features, self.hidden), init.kaiming)
            bias = op.param(f"{name[-1]}_bias", (heads * features,), init.uniform(self.hidden**-0.5))
            found[name] = op.mark_derived(name, op.linear(hidden_LM, weight, bias))
        return found

    def width(self, m: Match) -> int:
        """D: the features that the first projection of queries reads."""
        return self.queries(m, same_layer=False).shape[1]

    def attended(self, m: Match, op: Builder) -> fx.Node:
        """Return the value that the attention's queries are projected from."""
        return self.queries(m, same_layer=True).input

    def queries(self, m: Match, same_layer: bool) -> Match:
        """Return the first query projection of the site's kind, or of any kind."""
        queries = m.related(pg.attention.q, same_layer)
        self.require(bool(queries), f"no projection gives the queries of {m.site.id}; use hidden=none.")
        beside = [one for one in queries if (one.site.stack, one.site.kind) == (m.site.stack, m.site.kind)]
        return (beside or queries)[0]
