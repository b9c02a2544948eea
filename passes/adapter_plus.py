"""Adapter+ (Steitz and Roth, 2024): a bottleneck after the residual sum of a sublayer, with a scale for each feature.

    s = x + drop(F(x))   ->   s + c * (W_up drop(act(W_down s + b_down)) + b_up)
    no fold: the adapter is nonlinear, so no weight can express it

One adapter per block, after the feed-forward. In a post-norm block, which the paper does not have, it follows the
norm, y = N(s) -> y + c * A(y), as in the adapters library. c trains and starts at one. In training the adapter is
dropped for a whole example with probability drop_path, and divided by 1 - drop_path otherwise.
Shapes: D features of s, M width, c (D,). Both weights are normal with std 1e-2, truncated at two of them, and biases
zero: Houlsby's initialisation, as in the paper; init="identity" starts W_up at zero.
Source: arXiv 2406.06820, section 3 (Post-Adapter, channel-wise scaling); visinf/adapter_plus, vit_adapter.py;
adapter-hub/adapters 1.3, AdapterPlusConfig.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

import peftgraph as pg
from peftgraph.authoring import Builder, Match, Pass, Rule
from peftgraph.authoring.modules import Bottleneck, init

aten = torch.ops.aten

UP = {"houlsby": init.truncated_normal(1e-2), "identity": init.zeros}


@dataclass(frozen=True, kw_only=True)
class AdapterPlus(Pass):
    """A scaled bottleneck after the residual sum.

    Attributes:
        at: sublayers; the feed-forward by default.
        width: M, the size of the bottleneck; the paper's are 1 to 32.
        activation: a word of `peftgraph.authoring.ACTIVATIONS`.
        drop_path: the probability of dropping the adapter for an example, in training.
        dropout: on the bottleneck, in training.
        init: how W_up starts: "houlsby" or "identity" (zero).
    """

    word = "adapter_plus"
    at: pg.Selector = pg.ffn
    width: int = 8
    activation: str = "gelu"
    drop_path: float = 0.1
    dropout: float = 0.0
    init: Literal["houlsby", "identity"] = "houlsby"

    def check(self) -> None:
        """Refuse an unknown initialisation, a drop_path outside [0, 1), and what a bottleneck refuses."""
        self.require_one_of("init", UP)
        self.require(0 <= self.drop_path < 1, f"drop_path must lie in [0, 1), got {self.drop_path}.")
        self.bottleneck.check(self)

    @property
    def bottleneck(self) -> Bottleneck:
        """W_up drop(act(W_down s + b_down)) + b_up."""
        down, up = init.truncated_normal(1e-2), UP[self.init]
        return Bottleneck(width=self.width, activation=self.activation, dropout=self.dropout, down=down, up=up)

    def rules(self) -> list[Rule]:
        """Return one rule: add the scaled bottleneck to the residual sum, or to the norm that follows it."""
        return [Rule(at=self.at, delta=self.delta, fold="it is nonlinear, so no weight can express it")]

    def delta(self, m: Match, op: Builder) -> Mapping[str, fx.Node]:
        """Return c times the bottleneck of s, by the port where it enters."""
        self.require_sublayer(m)
        self.require_own_join(m, self.at)
        port = "normed" if m.has("normed") else "join"
        s = m.value(port)
        scale_D = op.param("scale", (m.features,), init.ones)
        return {port: self.sometimes(op, op.mul(self.bottleneck.build(op, s, m.features), scale_D))}

    def sometimes(self, op: Builder, delta: fx.Node) -> fx.Node:
        """Return delta, dropped for some examples in training (stochastic depth)."""
        if not self.drop_path:
            return delta
        value = delta.meta["val"]
        batch = op.call(aten.sym_size.int, delta, 0)
        ones = op.call(aten.new_ones.default, delta, [batch, *[1] * (value.dim() - 1)])
        return op.mul(delta, op.dropout(ones, self.drop_path))
