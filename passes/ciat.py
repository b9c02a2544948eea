"""CIAT (Zhu et al., 2021): adapters parallel to every sublayer and after the embedding, for one translation direction.

    e                ->   e + B(LN(e))      e is what enters the first block, before its dropout
    h = drop(F(x))   ->   h + B(LN(x))        B(x) = W_up drop(act(W_down x + b_down)) + b_up
    no fold: the adapter is nonlinear, so no weight can express it

x is the sublayer's input, in a pre-norm block the norm's output; LN is the adapter's own norm, which the authors'
code applies after that norm as well (layer_norm=false omits it in the layer adapters). Self-attention and
feed-forward of encoder and decoder have an adapter, cross-attention has none; the base and its norms stay frozen.
Shapes: D features, M width (D / 2 by default, as in the authors' code). Weights are Xavier-uniform, the default of
that code's framework for dense layers, and biases zero; init="identity" starts W_up at zero. The authors disable the
sublayers' own dropout while adapters train: trace a model without dropout for that. Their dropout in the bottleneck
is 0.3.
Source: arXiv 2104.08154, section 3; Yaoming95/CIAT, neurst/layers/adapters, neurst/models/transformer_CIAT.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import fx

import peftgraph as pg
from peftgraph.authoring import Add, Builder, Match, Pass, Rule
from peftgraph.authoring.modules import Bottleneck, init

UP = {"xavier_uniform": init.xavier_uniform(), "identity": init.zeros}


@dataclass(frozen=True, kw_only=True)
class CIAT(Pass):
    """Counter-interference adapters.

    Attributes:
        at: sublayers; self-attention and feed-forward by default.
        width: M of the layer adapters; none for D / 2.
        layer_norm: whether the layer adapters have a norm of their own.
        embedding: whether there are embedding adapters, one for each stack.
        embedding_width: M of those; none for D / 2.
        activation: a word of `peftgraph.authoring.ACTIVATIONS`.
        dropout: on the bottleneck, in training.
        init: how W_up starts: "xavier_uniform" or "identity" (zero).
    """

    word = "ciat"
    at: pg.Selector = pg.attention & pg.kind("self") | pg.ffn
    width: int | None = None
    layer_norm: bool = True
    embedding: bool = True
    embedding_width: int | None = None
    activation: str = "relu"
    dropout: float = 0.0
    init: Literal["xavier_uniform", "identity"] = "xavier_uniform"

    def check(self) -> None:
        """Refuse an unknown initialisation, and what a bottleneck refuses."""
        self.require_one_of("init", UP)
        for width in (self.width, self.embedding_width):
            self.bottleneck(1 if width is None else width).check(self)

    def bottleneck(self, width: int) -> Bottleneck:
        """B."""
        down, up = init.xavier_uniform(), UP[self.init]
        return Bottleneck(width=width, activation=self.activation, dropout=self.dropout, down=down, up=up)

    def rules(self) -> list[Rule]:
        """Add B(LN(x)) to every sublayer's output, and B(LN(e)) to what enters the first block of every stack."""
        reason = "it is nonlinear, so no weight can express it"
        layers = Rule(at=self.at, delta=self.layer, fold=reason)
        first = pg.block & pg.layers(0)
        embedding = Rule(at=first.where(path=".*"), delta=self.embedded, join=Add("embedded"), fold=reason)
        return [embedding, layers] if self.embedding else [layers]

    def layer(self, m: Match, op: Builder) -> fx.Node:
        """B(LN(x))."""
        self.require_sublayer(m)
        x = self.normed(op, m.input, m.features) if self.layer_norm else m.input
        return self.bottleneck(self.width or m.features // 2).build(op, x, m.features)

    def embedded(self, m: Match, op: Builder) -> fx.Node:
        """B(LN(e))."""
        e = self.normed(op, m.value("embedded"), m.features)
        return self.bottleneck(self.embedding_width or m.features // 2).build(op, e, m.features)

    def normed(self, op: Builder, x: fx.Node, features: int) -> fx.Node:
        """LN(x), with the adapter's own scale and shift and the authors' epsilon."""
        scale_D = op.param("norm_weight", (features,), init.ones)
        return op.layer_norm(x, scale_D, op.param("norm_bias", (features,), init.zeros), eps=1e-6)
