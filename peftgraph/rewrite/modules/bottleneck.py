"""The bottleneck module of adapters."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from peftgraph.ir.builder import ACTIVATIONS, Builder, Initializer
from peftgraph.rewrite.method import Pass
from peftgraph.rewrite.modules import init


@dataclass(frozen=True, kw_only=True)
class Bottleneck:
    """x (..., I)  ->  W_up drop(act(W_down x + b_down)) + b_up, (..., O)

    Shapes: I in, O out, M width; W_down (M, I), W_up (O, M). Biases start at zero.

    Attributes:
        width: M.
        activation: a word of `ACTIVATIONS`.
        dropout: on the narrow value, in training.
        down, up: initialisers of the two weights. With `up` zero, an added bottleneck changes nothing at first.
        trainable: whether its parameters train.
    """

    width: int
    activation: str
    dropout: float = 0.0
    down: Initializer = init.kaiming
    up: Initializer = init.zeros
    trainable: bool = True

    def check(self, method: Pass) -> None:
        """Refuse, in an error that names `method`, a width below 1, an unknown activation and a dropout outside [0,
        1)."""
        method.require(self.width >= 1, f"width must be at least 1, got {self.width}.")
        method.require(
            self.activation in ACTIVATIONS,
            f"activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}.",
        )
        method.require(0 <= self.dropout < 1, f"dropout must lie in [0, 1), got {self.dropout}.")

    def build(self, op: Builder, x: fx.Node, features: int, prefix: str = "") -> fx.Node:
        """Return the bottleneck of x; its four parameters are named `{prefix}down_weight`, ... `features`: O."""
        inner, trains = int(x.meta["val"].shape[-1]), self.trainable
        down_MI = op.param(f"{prefix}down_weight", (self.width, inner), self.down, trains)
        down_M = op.param(f"{prefix}down_bias", (self.width,), init.zeros, trains)
        up_OM = op.param(f"{prefix}up_weight", (features, self.width), self.up, trains)
        up_O = op.param(f"{prefix}up_bias", (features,), init.zeros, trains)
        narrow = op.activation(self.activation, op.linear(x, down_MI, down_M))
        return op.linear(op.dropout(narrow, self.dropout), up_OM, up_O)
