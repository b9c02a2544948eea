"""LoRA (Hu et al., 2021): a trainable low-rank path in parallel to a frozen projection.

    y = x W^T + b   ->   y = x W^T + b + w s (drop(x) A^T) B^T          s = alpha / rank
    fold: W <- W + w s B A                                  (the bias and every other column stay as they are)

Shapes: I in, O out, R rank; E experts as axis 0 where the weight is a stack of them. A_RI is uniform in +-1/sqrt(I)
as in the authors' code (the paper says Gaussian: init="gaussian", standard deviation 1/R) and B_OR is zero, so a fresh
pass is the identity. Each slice of a fused projection has an A and a B of its own. init="pissa": A and B start as the R
largest singular values and vectors of W, s B A = W_R, and the paper's frozen residual W - W_R is obtained without
changing W: the term of frozen copies A0, B0 is subtracted,

    y + s (drop(x) A^T) B^T - s (x A0^T) B0^T,   fold: W <- W + s (B A - B0 A0).

init="olora" does the same with the first columns of Q and rows of U of the decomposition W = Q U, Q with orthonormal
columns and U upper triangular: B = Q_R, A = U_R, whatever s is. init="loftq" is for weights that quantise stores as
codes: codes and factors are chosen together, so that D + s B A is close to W, where D is the dequantised weight. The
codes are saved with the adapter, and removing it restores the earlier ones. init="eva": the rows of A are the R
orthonormal directions in which the inputs of the site are largest, from data: program.calibrate(batches, lora), then
.apply(lora); B is zero. rank_stabilised=true: s = alpha / sqrt(rank). w is 1; `Program.mix` weights several named
LoRAs. For different ranks, use one LoRA for each rank, in a pipeline. bias="lora_only" trains the whole bias of each
adapted projection, bias="all" every bias, as in the authors' code; both fold.
Source: arXiv 2106.09685, section 4.1; microsoft/LoRA, loralib; arXiv 2312.03732, eq. 11 (rank-stabilised); arXiv
2404.02948, section 3 (PiSSA); arXiv 2406.01775, algorithm 1 (OLoRA); arXiv 2310.08659,
algorithm 1 (LoftQ); arXiv 2410.07170, section 3 (EVA).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from torch import Tensor, fx

import peftgraph as pg
from peftgraph.authoring import (
    AddProduct,
    Builder,
    Match,
    ParameterValue,
    Params,
    Pass,
    Rule,
    omit_default,
    train_parameters,
)
from peftgraph.authoring.modules import LowRank, init
from peftgraph.authoring.quantised import loftq
from peftgraph.authoring.training import Statistic

aten = torch.ops.aten

Start = Callable[[Tensor], object]

INITS = ("kaiming", "gaussian", "eva", "pissa", "olora", "loftq")
BIASES = ("none", "all", "lora_only")


@dataclass(frozen=True, kw_only=True)
class LoRA(Pass):
    """Low-rank adaptation.

    Attributes:
        at: any projections or embeddings; the paper's default is the query and the value.
        rank: R, at least 1 and at most the smaller side of every adapted matrix.
        alpha: the scale is alpha / rank.
        dropout: on the input of the low-rank path only, in training.
        init: of A: "kaiming" (the authors' code), "gaussian" (the paper) or "eva" (from data); of both A and B:
            "pissa", "olora", "loftq".
        rank_stabilised: the scale is alpha / sqrt(rank) instead.
        bias: which biases also train: "none", "all" or "lora_only".
        iterations: of LoftQ.
        weight: w, of either sign; with -1 the learned change is subtracted.
    """

    word = "lora"
    at: pg.Selector = pg.attention.q | pg.attention.v
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    init: Literal["kaiming", "gaussian", "eva", "pissa", "olora", "loftq"] = "kaiming"
    rank_stabilised: bool = omit_default(False)
    bias: Literal["none", "all", "lora_only"] = omit_default("none")
    iterations: int = omit_default(5)
    weight: float = omit_default(1.0)

    def check(self) -> None:
        """Refuse a rank below 1, a dropout outside [0, 1), unknown words and a weight that is no number."""
        self.path.check(self)
        self.require_one_of("init", INITS)
        self.require_one_of("bias", BIASES)
        self.require(self.iterations >= 1, f"iterations must be at least 1, got {self.iterations}.")
        self.require(math.isfinite(self.weight), f"weight must be finite, got {self.weight}.")

    @property
    def path(self) -> LowRank:
        """(drop(x) A^T) B^T."""
        return LowRank(rank=self.rank, dropout=self.dropout)

    @property
    def scale(self) -> float:
        """s = alpha / rank, or alpha / sqrt(rank)."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)

    @property
    def moved(self) -> bool:
        """Whether both factors start nonzero, so that their initial product is subtracted."""
        return self.init in ("pissa", "olora")

    def weighted(self, weight: float) -> Self:
        """Return the same pass with its delta scaled by w."""
        return replace(self, weight=self.weight * weight)

    def rules(self) -> list[Rule]:
        """Add the low-rank path to the projection's output; train biases."""
        max_rank = 2 * self.rank if self.moved else self.rank
        join = AddProduct(turns=True)
        path = Rule(
            at=self.at,
            delta=self.delta,
            join=join,
            fold=self.fold,
            max_rank=max_rank,
            row_axes=self.row_axes,
            check=self.fits,
        )
        biases = {
            "none": [],
            "all": [train_parameters(pg.bias)],
            "lora_only": [train_parameters(self.at, bias_only=True)],
        }
        return [path, *biases[self.bias]]

    def fits(self, sites: Sequence[pg.Site]) -> None:
        """Refuse a rank that no site has, or, where A and B start from the weight's singular directions, that some site
        does not reach."""
        self.path.fits(self, sites, everywhere=self.moved or self.init == "loftq")

    def delta(self, m: Match, op: Builder) -> fx.Node:
        """Return w s (drop(x) A^T) B^T, minus its initial value where that is not zero."""
        if self.init == "loftq":
            down, up = loftq(m, op, self.rank, self.scale, self.iterations)
            y = self.path.build(self, m, op, *self.path.factors(m, op, down=down, up=up))
        elif not self.moved:
            starts = {"kaiming": init.kaiming, "eva": init.principal_inputs(m, self.rank)}
            start = starts.get(self.init, init.normal(1 / self.rank))
            y = self.path.build(self, m, op, *self.path.factors(m, op, down=start))
        else:
            down, up = self.start(m)
            y = self.path.build(self, m, op, *self.path.factors(m, op, down=down, up=up))
            frozen = self.path.factors(m, op, "0", down=down, up=up, trainable=False)
            y = op.call(aten.sub.Tensor, y, replace(self.path, dropout=0.0).build(self, m, op, *frozen))
        return op.mul(y, self.weight * self.scale)

    def statistics(self) -> frozenset[Statistic]:
        """Return what the start asks of data."""
        return frozenset({"covariance"} if self.init == "eva" else ())

    def start(self, m: Match) -> tuple[Start, Start]:
        """Return how A and B start from the weight."""
        if self.init == "pissa":
            return init.principal(m.weight.value, self.rank, self.scale)
        return init.orthonormal_columns(m.weight.value, self.rank)

    def fold(self, m: Match, p: Params) -> Mapping[ParameterValue, Tensor]:
        """W + w s B A, less its start where that is not zero."""
        weight, change = m.weight, p.lora_B @ p.lora_A
        if self.moved:
            change = change - p.lora_B0 @ p.lora_A0
        return {weight: weight.value + self.weight * self.scale * change}

    def row_axes(self, m: Match) -> Mapping[str, int]:
        """B has the features of the output."""
        return {"lora_B": -2, "lora_B0": -2}
