"""The Pfeiffer adapter (Pfeiffer et al., 2021): one bottleneck in a block, on the residual sum.

    s = x + drop(F(x))   ->   s + W_up act(W_down N(s) + b_down) + b_up
    no fold: the adapter is nonlinear, so no weight can express it

N is the norm that follows s in a post-norm block, which is thereby used twice: y = LN(s + A(LN(s))). In a pre-norm
block no norm follows: the adapter reads the residual stream itself. In a block whose attention and feed-forward run
in parallel, s is the sum of both, so there is one adapter for the two. Norms stay frozen.
Shapes: D features of s, M width. Both weights are normal with std 0.02 and biases zero, as in the authors' code;
init="identity" starts W_up at zero. The place of the adapter differs between sources: after the feed-forward in
AdapterFusion, AdapterHub and UniPELT (the default), after self-attention in Compacter's baseline: at="attention".
Source: arXiv 2005.00247, section 3 and appendix; adapter-hub/adapters, methods/modeling.py, SeqBnConfig.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import fx

import peftgraph as pg
from peftgraph.authoring import Add, Builder, Match, Pass, Rule
from peftgraph.authoring.modules import Bottleneck, init

UP = {"bert": init.normal(0.02), "identity": init.zeros}


@dataclass(frozen=True, kw_only=True)
class Pfeiffer(Pass):
    """One bottleneck in a block.

    Attributes:
        at: sublayers; the feed-forward by default.
        width: M, the size of the bottleneck (the library's is D / 16).
        activation: a word of `peftgraph.authoring.ACTIVATIONS`.
        dropout: on the bottleneck, in training.
        init: how W_up starts: "bert" (normal, std 0.02) or "identity" (zero).
    """

    word = "pfeiffer"
    at: pg.Selector = pg.ffn
    width: int = 48
    activation: str = "relu"
    dropout: float = 0.0
    init: Literal["bert", "identity"] = "bert"

    def check(self) -> None:
        """Refuse an unknown initialisation, and what a bottleneck refuses."""
        self.require_one_of("init", UP)
        self.bottleneck.check(self)

    @property
    def bottleneck(self) -> Bottleneck:
        """W_up act(W_down N(s) + b_down) + b_up."""
        return Bottleneck(
            width=self.width,
            activation=self.activation,
            dropout=self.dropout,
            down=init.normal(0.02),
            up=UP[self.init],
        )

    def rules(self) -> list[Rule]:
        """Return one rule: add the bottleneck of the normed residual sum to the residual sum."""
        reason = "it is nonlinear, so no weight can express it"
        return [Rule(at=self.at, delta=self.delta, join=Add("join"), fold=reason, gate_input=self.normed)]

    def normed(self, m: Match, op: Builder) -> fx.Node:
        """N(s)."""
        return op.shared_value(f"{m.site.id}.normed", lambda: m.normed(op, m.value("join")))

    def delta(self, m: Match, op: Builder) -> fx.Node:
        """Return the bottleneck of N(s)."""
        self.require_sublayer(m)
        self.require_own_join(m, self.at)
        return self.bottleneck.build(op, self.normed(m, op), m.features)
