"""Compacter and Compacter++ (Mahabadi et al., 2021): serial bottlenecks whose weights are sums of Kronecker products.

    h   ->   h + U act(D h + b_down) + b_up          D, U = sum_i A_i (x) (s_i t_i)          LN trains
    no fold: the adapter is nonlinear, so no weight can express it (trained norms do fold)

x W with W = sum_i A_i (x) (s_i t_i) is computed without W: x is split into N rows, which are multiplied by s, mixed
by A, and multiplied by t. The rule A is one parameter of the whole pass (shared=true); s and t have rank 1.
Shapes: I in, O out, N the number of products, R rank; A (N, N, N), left s (N, I/N, R), right t (N, R, O/N).
rank=none keeps whole (N, I/N, O/N) matrices instead: with n=12 and shared=false that is the paper's PHM-adapter.
Left and right start Xavier-uniform with gain sqrt(2) slice by slice, A normal with std 1e-4 (1e-2 when it is not
shared), as in the authors' code; init="xavier_normal" (gain 1) is the adapters library's. Biases are zero. Adapters
are applied after self-attention and the feed-forward, before the dropout (Compacter++: after the feed-forward
alone); all norms train.
Source: arXiv 2106.04647, section 3; rabeehk/compacter, seq2seq/hypercomplex/layers.py, configs/compacter.json.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

import peftgraph as pg
from peftgraph.authoring import Add, Builder, Match, Pass, Rule, train_parameters
from peftgraph.authoring.modules import Bottleneck, init

aten = torch.ops.aten

STARTS = {"xavier_uniform": init.xavier_uniform(math.sqrt(2)), "xavier_normal": init.xavier_normal(1.0)}
PORTS = {"before_dropout": "undropped", "after_dropout": "output", "residual_sum": "join"}


@dataclass(frozen=True, kw_only=True)
class Compacter(Pass):
    """Hypercomplex bottlenecks.

    Attributes:
        at: sublayers; self-attention and feed-forward by default.
        width: the size of the bottleneck; n divides it and the model's width.
        n: N, the number of Kronecker products and the size of the rule.
        rank: R of the second factors; none for full matrices.
        shared: whether all adapters and both projections share one rule; otherwise each projection has its own.
        activation: a word of `peftgraph.authoring.ACTIVATIONS`.
        dropout: on the bottleneck, in training.
        init: "xavier_uniform" (the authors' code) or "xavier_normal" (the adapters library).
        place: "before_dropout" (the authors' code) or "after_dropout" of the sublayer; or "residual_sum", as in
            `Pfeiffer` and in the adapters library's Compacter++.
        norms: whether all layer norms train.
    """

    word = "compacter"
    at: pg.Selector = pg.attention & pg.kind("self") | pg.ffn
    width: int = 24
    n: int = 4
    rank: int | None = 1
    shared: bool = True
    activation: str = "gelu_tanh"
    dropout: float = 0.0
    init: Literal["xavier_uniform", "xavier_normal"] = "xavier_uniform"
    place: Literal["before_dropout", "after_dropout", "residual_sum"] = "before_dropout"
    norms: bool = True

    def check(self) -> None:
        """Refuse unknown words, sizes below 1, a width that n does not divide, and what a bottleneck refuses."""
        self.require_one_of("init", STARTS)
        self.require_one_of("place", PORTS)
        Bottleneck(width=self.width, activation=self.activation, dropout=self.dropout).check(self)
        self.require(self.n >= 1, f"n must be at least 1, got {self.n}.")
        self.require(self.rank is None or self.rank >= 1, f"rank must be at least 1 or none, got {self.rank}.")
        self.require(self.width % self.n == 0, f"n={self.n} does not divide width={self.width}.")

    def rules(self) -> list[Rule]:
        """Add the bottleneck of the sublayer's output to it; train the norms."""
        reason = "it is nonlinear, so no weight can express it"
        adapter = Rule(at=self.at, delta=self.delta, join=Add(PORTS[self.place]), fold=reason)
        return [adapter, train_parameters(pg.norm)] if self.norms else [adapter]

    def delta(self, m: Match, op: Builder) -> fx.Node:
        """U act(D h + b_down) + b_up."""
        self.require_sublayer(m)
        self.require(m.features % self.n == 0, f"n={self.n} does not divide the {m.features} features of {m.site.id}.")
        h = m.value(PORTS[self.place])
        h = m.normed(op, h) if self.place == "residual_sum" else h
        narrow = self.product(op, "down", h, m.features, self.width)
        narrow = op.dropout(op.activation(self.activation, narrow), self.dropout)
        return self.product(op, "up", narrow, self.width, m.features)

    def product(self, op: Builder, side: str, x: fx.Node, inner: int, out: int) -> fx.Node:
        """Return x (..., I) -> x W + b (..., O), through N rows of I/N features."""
        n, start = self.n, STARTS[self.init]
        std = 1e-4 if self.shared else 1e-2
        make = op.shared_param if self.shared else op.param
        rule_NNN = make("phm_rule" if self.shared else f"{side}_rule", (n, n, n), init.normal(std))
        bias_O = op.param(f"{side}_bias", (out,), init.zeros)
        rows = op.call(aten.unflatten.int, x, -1, [n, inner // n])
        if self.rank is None:
            whole = op.param(f"{side}_weight", (n, inner // n, out // n), start)
            y = op.call(aten.einsum.default, "...ab,ibe,iac->...ce", [rows, whole, rule_NNN])
        else:
            left = op.param(f"{side}_left", (n, inner // n, self.rank), start)
            right = op.param(f"{side}_right", (n, self.rank, out // n), start)
            narrow = op.call(aten.einsum.default, "...ab,ibr->...air", [rows, left])
            mixed = op.call(aten.einsum.default, "...air,iac->...cir", [narrow, rule_NNN])
            y = op.call(aten.einsum.default, "...cir,ire->...ce", [mixed, right])
        return op.add(op.call(aten.flatten.using_ints, y, -2, -1), bias_O)


@dataclass(frozen=True, kw_only=True)
class CompacterPP(Compacter):
    """Compacter++: after the feed-forward alone."""

    word = "compacter_pp"
    at: pg.Selector = pg.ffn
