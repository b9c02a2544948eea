"""LoRA (Hu et al., 2021): a trainable low-rank path beside a frozen projection.

    y = x W^T + b   ->   y = x W^T + b + s (drop(x) A^T) B^T            s = alpha / rank
    fold: W <- W + s B A                                    (the bias and every other column stay as they are)

Shapes: I in, O out, R rank; E experts in front where the weight is a stack of experts.
A_RI is uniform in +-1/sqrt(I) as in the authors' code (the paper says Gaussian: init="gaussian", standard deviation
1/R) and B_OR is zero, so a fresh pass is the identity. Each slice of a fused projection has an A and a B of its own.
Source: arXiv 2106.09685, section 4.1; microsoft/LoRA, loralib/layers.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, fx

import peftgraph as pg


@dataclass(frozen=True, kw_only=True)
class LoRA(pg.Pass):
    """Low-rank adaptation.

    Attributes:
        at: any projections or embeddings; the paper's default is the query and the value.
        rank: R, at least 1 and at most the smaller side of every matrix it is put on.
        alpha: the scale is alpha / rank.
        dropout: on the input of the low-rank path only, in training.
        init: how A starts: "kaiming" (the authors' code) or "gaussian" (the paper).
    """

    word = "lora"
    at: pg.Selector = pg.attention.q | pg.attention.v
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    init: Literal["kaiming", "gaussian"] = "kaiming"

    def check(self) -> None:
        """Refuses a rank below 1, a dropout outside [0, 1) and an unknown initialisation."""
        self.require(self.rank >= 1, f"rank must be at least 1, got {self.rank}.")
        self.require(0 <= self.dropout < 1, f"dropout must lie in [0, 1), got {self.dropout}.")
        self.require(self.init in ("kaiming", "gaussian"), f'init must be "kaiming" or "gaussian", got {self.init!r}.')

    @property
    def scale(self) -> float:
        """s = alpha / rank."""
        return self.alpha / self.rank

    def rules(self) -> list[pg.Rule]:
        """One rule: add the low-rank path to the projection's output."""
        return [pg.Rule(at=self.at, delta=self.delta, fold=self.fold, rank=self.rank)]

    def delta(self, m: pg.Match, op: pg.Builder) -> fx.Node:
        """s (drop(x) A^T) B^T."""
        out, inner = m.shape
        limit = min(out, inner)
        self.require(
            self.rank <= limit, f"rank {self.rank} is larger than {m.site.id} allows: {out} x {inner}, at most {limit}."
        )
        start = pg.init.kaiming if self.init == "kaiming" else pg.init.normal(1 / self.rank)
        a_RI = op.param("lora_A", (*m.experts, self.rank, inner), start)
        b_OR = op.param("lora_B", (*m.experts, out, self.rank), pg.init.zeros)
        x = m.input if m.site.role == "embedding" else op.dropout(m.input, self.dropout)
        return op.mul(m.up(op, m.down(op, x, a_RI), b_OR), self.scale)

    def fold(self, m: pg.Match, p: pg.Params) -> Mapping[pg.Bound, Tensor]:
        """W + s B A."""
        return {m.weight: m.weight.value + self.scale * (p.lora_B @ p.lora_A)}
