"""The low-rank path of LoRA and related methods, in parallel to a projection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from peftgraph.ir.builder import Builder, Initializer
from peftgraph.rewrite.match import Match
from peftgraph.rewrite.method import Pass
from peftgraph.rewrite.modules import init
from peftgraph.sites import Site

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """x (..., I)  ->  (drop(x) A^T) B^T, (..., O), computed like the site's own product

    Shapes: I in, O out, R rank; A (R, I), B (O, R), with the number of experts as the first dimension where weights are
    stacked.

    Attributes:
        rank: R.
        dropout: on x, in training; not on the token ids that an embedding reads.
    """

    rank: int
    dropout: float = 0.0

    def check(self, method: Pass) -> None:
        """Refuse, in an error that names `method`, a rank below 1 and a dropout outside [0, 1)."""
        method.require(self.rank >= 1, f"rank must be at least 1, got {self.rank}.")
        method.require(0 <= self.dropout < 1, f"dropout must lie in [0, 1), got {self.dropout}.")

    def fits(self, method: Pass, sites: Sequence[Site], everywhere: bool = False) -> None:
        """Refuse a rank larger than the smaller side of every site's matrix; with `everywhere`, of any site's matrix.

        Among many sites, a small matrix such as a head with one output may get a higher rank than it can use.
        """
        sides = [min(site.shape) for site in sites if site.shape]
        limit = (min if everywhere else max)(sides, default=self.rank)
        site = next((site for site in sites if site.shape and min(site.shape) == limit), sites[0])
        size = " x ".join(map(str, site.shape or ()))
        method.require(
            self.rank <= limit, f"rank {self.rank} is larger than {site.id} allows: {size}, at most {limit}."
        )

    def factors(
        self,
        m: Match,
        op: Builder,
        suffix: str = "",
        *,
        down: Initializer = init.kaiming,
        up: Initializer = init.zeros,
        trainable: bool = True,
    ) -> tuple[fx.Node, fx.Node]:
        """Return new parameters lora_A{suffix} and lora_B{suffix}."""
        out, inner = m.shape
        a_RI = op.param(f"lora_A{suffix}", (*m.experts, self.rank, inner), down, trainable)
        return a_RI, op.param(f"lora_B{suffix}", (*m.experts, out, self.rank), up, trainable)

    def build(self, method: Pass, m: Match, op: Builder, a_RI: fx.Node, b_OR: fx.Node) -> fx.Node:
        """Return the low-rank path from the site's current input; B A, where a change enters the weight itself.

        Raises:
            RecipeError: there is dropout on a value that the path does not read.
        """
        if m.form == "weight":
            method.require(
                not self.dropout,
                f"dropout must be 0 at {m.site.id}: the change enters {m.weight.view} itself, and no value is dropped.",
            )
            return op.call(aten.matmul.default, b_OR, a_RI)
        if m.transposed:  # (B A)^T = A^T B^T
            a_RI, b_OR = op.call(aten.t.default, b_OR), op.call(aten.t.default, a_RI)
        x = m.input if m.site.role == "embedding" else op.dropout(m.input, self.dropout)
        return m.up(op, m.down(op, x, a_RI), b_OR)
