"""DoRA (Liu et al., 2024): the weight as magnitude and direction; a low-rank path changes the direction.

    y = x W^T + b   ->   y = x W'^T + b,    W' = g V,  V = W + s B A,  g = M / ||V||           s = alpha / rank
    fold: W <- g V                                          (the bias and every other column stay as they are)

W' is not computed in the graph: (g - 1) (y - b) + g s (drop(x) A^T) B^T is added to y. The norm is over the inputs
of each output feature, as in the authors' code. As in the paper's section 4.3 it is a constant for the gradient;
norm_gradient=true differentiates it. M starts at ||W||, A uniform in +-1/sqrt(I) and B at zero, so a fresh pass is
the identity. Dropout applies to the low-rank path alone; the authors' code applies it to the input of (g - 1) x W^T
as well. form="adapters" is what that library computes: g = M / ||W + B A||, without s, and g multiplies the bias as
well, so that b <- g b. (Its merged weights include neither s nor the bias, so outputs differ from the trained ones.)
Shapes: I in, O out, R rank; E experts as axis 0. A (R, I), B (O, R), M and g (O,). Each slice of a fused projection
has its own. Deltas of other passes at the site are added separately: g scales only the base's computation.
Source: arXiv 2402.09353, equations 5 and 11; NVlabs/DoRA, commonsense_reasoning/peft/tuners/dora.py;
adapter-hub/adapters 1.3, methods/lora.py (LoRALinear.forward, dora_merge).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx

import peftgraph as pg
from peftgraph.authoring import AddProduct, Builder, Match, ParameterValue, Params, Pass, Rule, omit_default
from peftgraph.authoring.modules import LowRank

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class DoRA(Pass):
    """Weight-decomposed low-rank adaptation.

    Attributes:
        at: any projections or embeddings; the paper's five by default.
        rank: R, at least 1 and at most the smaller side of every adapted matrix.
        alpha: the scale is alpha / rank.
        dropout: on the input of the low-rank path only, in training.
        rank_stabilised: the scale is alpha / sqrt(rank) instead.
        norm_gradient: whether the gradient passes through ||V||.
        form: "paper", or "adapters", which differs where alpha is not the rank or a projection has a bias.
    """

    word = "dora"
    at: pg.Selector = pg.attention.q | pg.attention.k | pg.attention.v | pg.ffn.up | pg.ffn.down
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    rank_stabilised: bool = omit_default(False)
    norm_gradient: bool = omit_default(False)
    form: Literal["paper", "adapters"] = omit_default("paper")

    def check(self) -> None:
        """Refuse a rank below 1, a dropout outside [0, 1) and an unknown form."""
        self.path.check(self)
        self.require_one_of("form", ("paper", "adapters"))

    @property
    def path(self) -> LowRank:
        """(drop(x) A^T) B^T."""
        return LowRank(rank=self.rank, dropout=self.dropout)

    @property
    def scale(self) -> float:
        """s = alpha / rank, or alpha / sqrt(rank)."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)

    @property
    def weighs(self) -> float:
        """The factor of B A in ||V||."""
        return self.scale if self.form == "paper" else 1.0

    def rules(self) -> list[Rule]:
        """Return one rule: add x W'^T - x W^T."""
        join = AddProduct()
        return [Rule(at=self.at, delta=self.delta, join=join, fold=self.fold, row_axes=self.row_axes, check=self.fits)]

    def fits(self, sites: Sequence[pg.Site]) -> None:
        """Refuse a rank that no site has."""
        self.path.fits(self, sites)

    def delta(self, m: Match, op: Builder) -> fx.Node:
        """Return (g - 1) (y - b) + g s (drop(x) A^T) B^T."""
        scales_bias = self.form == "adapters" and m.form == "weight" and m.bias is not None
        self.require(
            not scales_bias, f'form="adapters" scales the bias of {m.site.id}, and only its weight is at hand.'
        )
        a_RI, b_OR = self.path.factors(m, op)
        w_OI = m.read(op, m.weight)
        change_OI = op.mul(op.call(aten.matmul.default, b_OR, a_RI), self.weighs)
        if not self.norm_gradient:
            change_OI = op.call(aten.detach.default, change_OI)
        v_OI = op.call(aten.contiguous.default, op.add(w_OI, change_OI))
        norm_O = op.call(aten.linalg_vector_norm.default, v_OI, 2, [-1])
        m_O = op.param("dora_m", (*m.experts, m.shape[0]), lambda tensor: self.start(m, tensor))
        g = m.along_features(op, op.call(aten.div.Tensor, m_O, norm_O))
        y = m.base_product(op) if self.form == "paper" or m.form == "weight" else m.base_output(op)
        low = op.mul(self.path.build(self, m, op, a_RI, b_OR), self.scale)
        return op.add(op.mul(op.call(aten.sub.Tensor, g, 1), y), op.mul(low, g))

    def start(self, m: Match, tensor: Tensor) -> None:
        """Fill a tensor with ||W||, bit for bit as the graph computes it in its layout and dtype; refuse rows of
        zeros."""
        norm_O = torch.linalg.vector_norm(m.weight.value.to(tensor.dtype).contiguous(), 2, -1)
        zeros = int((norm_O == 0).sum())
        self.require(
            not zeros,
            f"{zeros} of {norm_O.numel()} rows of the weight at {m.site.id} are zero and have no direction. Leave that "
            f"site out, or use lora there.",
        )
        tensor.copy_(norm_O)

    def fold(self, m: Match, p: Params) -> Mapping[ParameterValue, Tensor]:
        """Return g (W + s B A), and g b where the form has it."""
        weight, change_OI = m.weight, p.lora_B @ p.lora_A
        g_O = p.dora_m / torch.linalg.vector_norm(weight.value + self.weighs * change_OI, 2, -1)
        folded = {weight: g_O.unsqueeze(-1) * (weight.value + self.scale * change_OI)}
        return folded if m.bias is None or self.form == "paper" else folded | {m.bias: g_O * m.bias.value}

    def row_axes(self, m: Match) -> Mapping[str, int]:
        """B and m have the features of the output; the norm is of one row."""
        return {"lora_B": -2, "dora_m": -1}
