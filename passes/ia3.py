"""(IA)^3 (Liu et al., 2022): learned vectors rescale keys, values and the hidden activations of the feed-forward.

    k = x W_k^T + b_k      ->   l_k * k              fold: W_k <- diag(l_k) W_k,  b_k <- l_k * b_k       (v alike)
    h = act(...)           ->   l_ff * h             fold: W_down <- W_down diag(l_ff)                   (b_down stays)

Shapes: O features of the key or value the site owns, F features of the hidden value; E experts in front of either.
All vectors start at one, so a fresh pass is the identity. The hidden value is the one that enters the down projection:
after the nonlinearity, and after the product of a gated unit.
Source: arXiv 2205.05638, section 3.3; r-three/t-few, models/lora.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, fx

import peftgraph as pg


@dataclass(frozen=True, kw_only=True)
class IA3(pg.Pass):
    """Infused Adapter by Inhibiting and Amplifying Inner Activations.

    Attributes:
        at: projections whose output is scaled, and `ffn.hidden`; the paper's three by default.
    """

    word = "ia3"
    at: pg.Selector = pg.attention.k | pg.attention.v | pg.ffn.hidden

    def rules(self) -> list[pg.Rule]:
        """One rule: multiply the value by a learned vector."""
        return [pg.Rule(at=self.at, delta=self.delta, join=pg.Multiply(), fold=self.fold)]

    def delta(self, m: pg.Match, op: pg.Builder) -> fx.Node:
        """The vector l, shaped to broadcast over the value."""
        self.require(
            m.site.weight is not None,
            f"{m.site.id} has no weight to fold a scale into; choose projections or ffn.hidden.",
        )
        return m.along_features(op, op.param("ia3_l", (*m.experts, m.features), pg.init.ones))

    def fold(self, m: pg.Match, p: pg.Params) -> Mapping[pg.Bound, Tensor]:
        """Rows of the weight and the bias for an output, columns of the weight for the hidden value."""
        weight = m.weight
        if m.site.role == "ffn.hidden":
            return {weight: weight.value * p.ia3_l.unsqueeze(-2)}
        scaled = {weight: weight.value * p.ia3_l.unsqueeze(-1)}
        return scaled if m.bias is None else scaled | {m.bias: m.bias.value * p.ia3_l}
