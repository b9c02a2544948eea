"""The serial bottleneck adapter (Houlsby et al., 2019, in the form that starts as the identity).

    h   ->   h + W_up act(W_down h + b_down) + b_up
    no fold: a nonlinearity stands between the adapter and every weight around it

h is the output of a sublayer after its dropout, before the residual add (and before the norm of a post-norm block).
Shapes: D features of h, M width. W_down is normal with standard deviation 1e-2, truncated at two of them, as in the
paper (the authors' code starts at 1e-3: std=1e-3); W_up and both biases are zero, so a fresh pass is the identity (the
paper draws W_up from the same normal, which makes it nearly so).
Source: arXiv 1902.00751, section 2.1; google-research/adapter-bert, modeling.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, fx, nn

import peftgraph as pg


@dataclass(frozen=True, kw_only=True)
class SerialAdapter(pg.Pass):
    """A bottleneck after a sublayer.

    Attributes:
        at: sublayers; attention and feed-forward by default.
        width: M, the size of the bottleneck.
        activation: "relu", "gelu", "silu", "tanh" or "sigmoid".
        dropout: on the bottleneck, in training.
        std: the standard deviation that W_down is drawn with, before it is truncated.
    """

    word = "serial_adapter"
    at: pg.Selector = pg.attention | pg.ffn
    width: int = 64
    activation: str = "gelu"
    dropout: float = 0.0
    std: float = 1e-2

    def check(self) -> None:
        """Refuses an empty bottleneck, an unknown activation, a dropout outside [0, 1) and a std of 0 or less."""
        self.require(self.width >= 1, f"width must be at least 1, got {self.width}.")
        self.require(
            self.activation in pg.ACTIVATIONS,
            f"activation must be one of {', '.join(pg.ACTIVATIONS)}, got {self.activation!r}.",
        )
        self.require(0 <= self.dropout < 1, f"dropout must lie in [0, 1), got {self.dropout}.")
        self.require(self.std > 0, f"std must be positive, got {self.std}.")

    def rules(self) -> list[pg.Rule]:
        """One rule: add the bottleneck of the output to the output."""
        return [pg.Rule(at=self.at, delta=self.delta, fold="its nonlinearity stands between it and every weight")]

    def delta(self, m: pg.Match, op: pg.Builder) -> fx.Node:
        """W_up act(W_down h + b_down) + b_up."""
        down_MD = op.param("down_weight", (self.width, m.features), self.start)
        down_M = op.param("down_bias", (self.width,), pg.init.zeros)
        up_DM = op.param("up_weight", (m.features, self.width), pg.init.zeros)
        up_D = op.param("up_bias", (m.features,), pg.init.zeros)
        narrow = op.activation(self.activation, op.linear(m.output, down_MD, down_M))
        return op.linear(op.dropout(narrow, self.dropout), up_DM, up_D)

    def start(self, tensor: Tensor) -> None:
        """How W_down starts."""
        nn.init.trunc_normal_(tensor, std=self.std, a=-2 * self.std, b=2 * self.std)
