"""The plain serial bottleneck adapter, which starts as the identity; `Houlsby` is the method of the paper.

    h   ->   h + W_up act(W_down h + b_down) + b_up
    no fold: the adapter is nonlinear, so no weight can express it

h is the output of a sublayer after its dropout, before the residual add (and before the norm of a post-norm block).
Shapes: D features of h, M width. W_down is normal with standard deviation 1e-2, truncated at two of them, as in the
paper (the authors' code starts at 1e-3: std=1e-3); W_up and both biases are zero, so a fresh pass is the identity (the
paper draws W_up from the same normal, which makes it nearly so).
Source: arXiv 1902.00751, section 2.1; google-research/adapter-bert, modeling.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

import peftgraph as pg
from peftgraph.authoring import Builder, Match, Pass, Rule
from peftgraph.authoring.modules import Bottleneck, init


@dataclass(frozen=True, kw_only=True)
class SerialAdapter(Pass):
    """A bottleneck after a sublayer.

    Attributes:
        at: sublayers; attention and feed-forward by default.
        width: M, the size of the bottleneck.
        activation: "relu", "gelu", "gelu_tanh", "silu", "tanh" or "sigmoid".
        dropout: on the bottleneck, in training.
        std: the standard deviation of W_down before truncation.
    """

    word = "serial_adapter"
    at: pg.Selector = pg.attention | pg.ffn
    width: int = 64
    activation: str = "gelu"
    dropout: float = 0.0
    std: float = 1e-2

    def check(self) -> None:
        """Refuse an empty bottleneck, an unknown activation, a dropout outside [0, 1) and a std of 0 or less."""
        self.bottleneck.check(self)
        self.require(self.std > 0, f"std must be positive, got {self.std}.")

    @property
    def bottleneck(self) -> Bottleneck:
        """W_up act(W_down h + b_down) + b_up."""
        down = init.truncated_normal(self.std)
        return Bottleneck(width=self.width, activation=self.activation, dropout=self.dropout, down=down)

    def rules(self) -> list[Rule]:
        """Return one rule: add the bottleneck of the output to the output."""
        reason = "it is nonlinear, so no weight can express it"
        return [Rule(at=self.at, delta=self.delta, fold=reason, gate_input=self.read)]

    def read(self, m: Match, op: Builder) -> fx.Node:
        """Return h."""
        return m.output

    def delta(self, m: Match, op: Builder) -> fx.Node:
        """Return the bottleneck of h."""
        return self.bottleneck.build(op, self.read(m, op), m.features)
