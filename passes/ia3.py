"""(IA)^3 (Liu et al., 2022): learned vectors rescale keys, values and the hidden activations of the feed-forward.

    k = x W_k^T + b_k      ->   l_k * k              fold: W_k <- diag(l_k) W_k,  b_k <- l_k * b_k       (v alike)
    h = act(...)           ->   l_ff * h             fold: W_down <- W_down diag(l_ff)                   (b_down stays)

Shapes: O features of the key or value the site owns, F features of the hidden value; E experts as axis 0 of either.
All vectors start at one, so a fresh pass is the identity. The hidden value is the one that enters the down projection:
after the nonlinearity, and after the product of a gated unit. side="input" scales what a projection reads, as peft
does where its feedforward_modules name one: x W^T -> (l * x) W^T, fold: W <- W diag(l).
Source: arXiv 2205.05638, section 3.3; r-three/t-few, models/lora.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, fx

import peftgraph as pg
from peftgraph.authoring import Builder, Match, Multiply, ParameterValue, Params, Pass, Rule, omit_default
from peftgraph.authoring.modules import init


@dataclass(frozen=True, kw_only=True)
class IA3(Pass):
    """Infused Adapter by Inhibiting and Amplifying Inner Activations.

    Attributes:
        at: projections whose output is scaled, and `ffn.hidden`; the paper's three by default.
        side: "output", or "input" for projections whose input is scaled.
    """

    word = "ia3"
    at: pg.Selector = pg.attention.k | pg.attention.v | pg.ffn.hidden
    side: Literal["output", "input"] = omit_default("output")

    def check(self) -> None:
        """Refuse an unknown side."""
        self.require_one_of("side", ("output", "input"))

    def rules(self) -> list[Rule]:
        """Return one rule: multiply the value by a learned vector."""
        return [Rule(at=self.at, delta=self.delta, join=Multiply(self.side), fold=self.fold, row_axes=self.row_axes)]

    def delta(self, m: Match, op: Builder) -> fx.Node:
        """Return the vector l in a shape that broadcasts over the value."""
        self.require(
            m.site.weight is not None,
            f"{m.site.id} has no weight to fold a scale into; choose projections or ffn.hidden.",
        )
        if self.side == "output":
            return m.along_features(op, op.param("ia3_l", (*m.experts, m.features), init.ones))
        plain = not m.experts and m.site.columns is None and m.site.feature_axis == -1
        self.require(
            plain and m.site.role not in ("ffn.hidden", "embedding"),
            f"the input of {m.site.id} is no vector of its own; choose whole projections, or side=output.",
        )
        return op.param("ia3_l", (m.shape[1],), init.ones)

    def fold(self, m: Match, p: Params) -> Mapping[ParameterValue, Tensor]:
        """Scale rows of the weight and the bias for an output, columns of the weight for an input."""
        weight = m.weight
        if self.at_input(m):
            return {weight: weight.value * p.ia3_l.unsqueeze(-2)}
        scaled = {weight: weight.value * p.ia3_l.unsqueeze(-1)}
        return scaled if m.bias is None else scaled | {m.bias: m.bias.value * p.ia3_l}

    def row_axes(self, m: Match) -> Mapping[str, int]:
        """Return which axis of l follows the rows of the weight: its last, unless l scales the input's features."""
        return {} if self.at_input(m) else {"ia3_l": -1}

    def at_input(self, m: Match) -> bool:
        """Tell whether the input of the site's weight is scaled."""
        return self.side == "input" or m.site.role == "ffn.hidden"
