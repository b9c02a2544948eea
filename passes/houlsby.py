"""Houlsby adapters (Houlsby et al., 2019): two serial bottlenecks in every block, and every layer norm trains.

    h   ->   h + W_up act(W_down h + b_down) + b_up          LN trains
    no fold: the adapter is nonlinear, so no weight can express it (trained norms do fold)

h is the output of attention and of the feed-forward, after the dropout, before the residual add (and before the norm
of a post-norm block): y = LN(x + A(drop(F(x)))), or y = x + A(drop(F(LN(x)))).
Shapes: D features of h, M width. Both weights are normal, truncated at two standard deviations; biases are zero. The
paper says std 1e-2, the authors' code has 1e-3 (init="code"). Their code's GELU is the tanh form: "gelu_tanh". Ports
to T5 put the adapter before the dropout: place="before_dropout". In the paper the task's head trains too; that is
not part of the pass.
Source: arXiv 1902.00751, section 2.1 and appendix A; google-research/adapter-bert, modeling.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import fx

import peftgraph as pg
from peftgraph.authoring import Add, Builder, Match, Pass, Rule, train_parameters
from peftgraph.authoring.modules import Bottleneck, init

STD = {"paper": 1e-2, "code": 1e-3}
PORTS = {"after_dropout": "output", "before_dropout": "undropped"}


@dataclass(frozen=True, kw_only=True)
class Houlsby(Pass):
    """Two bottlenecks in a block.

    Attributes:
        at: sublayers; self-attention and feed-forward by default, so that a decoder's block has two as well.
        width: M, the size of the bottleneck.
        activation: a word of `peftgraph.authoring.ACTIVATIONS`.
        dropout: on the bottleneck, in training.
        init: "paper" (std 1e-2) or "code" (std 1e-3).
        place: "after_dropout" or "before_dropout" of the sublayer.
        norms: whether all layer norms train.
    """

    word = "houlsby"
    at: pg.Selector = pg.attention & pg.kind("self") | pg.ffn
    width: int = 64
    activation: str = "gelu"
    dropout: float = 0.0
    init: Literal["paper", "code"] = "paper"
    place: Literal["after_dropout", "before_dropout"] = "after_dropout"
    norms: bool = True

    def check(self) -> None:
        """Refuse an unknown initialisation or place, and what a bottleneck refuses."""
        self.require_one_of("init", STD)
        self.require_one_of("place", PORTS)
        self.bottleneck.check(self)

    @property
    def bottleneck(self) -> Bottleneck:
        """W_up act(W_down h + b_down) + b_up."""
        start = init.truncated_normal(STD[self.init])
        return Bottleneck(width=self.width, activation=self.activation, dropout=self.dropout, down=start, up=start)

    def rules(self) -> list[Rule]:
        """Add the bottleneck of the sublayer's output to it; train the norms."""
        reason = "it is nonlinear, so no weight can express it"
        adapter = Rule(at=self.at, delta=self.delta, join=Add(PORTS[self.place]), fold=reason, gate_input=self.read)
        return [adapter, train_parameters(pg.norm)] if self.norms else [adapter]

    def read(self, m: Match, op: Builder) -> fx.Node:
        """Return h."""
        return m.value(PORTS[self.place])

    def delta(self, m: Match, op: Builder) -> fx.Node:
        """Return the bottleneck of h."""
        self.require_sublayer(m)
        return self.bottleneck.build(op, self.read(m, op), m.features)
