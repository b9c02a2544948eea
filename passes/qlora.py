"""QLoRA (Dettmers et al., 2023): LoRA on frozen weights that are stored as 4-bit codes.

    y = x W^T + b   ->   y = x D(W)^T + b + s (drop(x) A^T) B^T          D(W) dequantised in the product
    no fold into codes: pg.fold(tuned, quantised=...) names the ways out

A pipeline of two passes: quantise, then lora, both at the same projections: all of the blocks, as in the paper, and not
the head. Rank 64 and alpha 16 are the paper's.
Source: arXiv 2305.14314, section 3; artidoro/qlora.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import peftgraph as pg
from peftgraph.authoring import Pass, Rule

from .lora import LoRA
from .quantise import PROJECTIONS, Quantise


@dataclass(frozen=True, kw_only=True)
class QLoRA(Pass):
    """Quantised weights with a low-rank path.

    Attributes:
        at: projections; by default all of attentions and feed-forwards.
        rank: R of the low-rank path.
        alpha: its scale is alpha / rank.
        dropout: on its input, in training.
        format: of the codes: "nf4", "fp4" or "int8".
        block: values that share a constant.
        double: whether the constants are quantised too.
        compute: the dtype of the product with the dequantised weight.
    """

    word = "qlora"
    at: pg.Selector = PROJECTIONS
    rank: int = 64
    alpha: float = 16.0
    dropout: float = 0.0
    format: Literal["nf4", "fp4", "int8"] = "nf4"
    block: int = 64
    double: bool = True
    compute: Literal["bfloat16", "float16", "float32", "stored"] = "bfloat16"

    def check(self) -> None:
        """Refuse what either part refuses."""
        self.passes()

    def passes(self) -> tuple[Pass, ...]:
        """Return the two passes."""
        codes = Quantise(at=self.at, format=self.format, block=self.block, double=self.double, compute=self.compute)
        low_rank = LoRA(at=self.at, rank=self.rank, alpha=self.alpha, dropout=self.dropout, name=self.name)
        return (codes, low_rank)

    def rules(self) -> list[Rule]:
        """Return the rules of both parts."""
        return [rule for part in self.passes() for rule in part.rules()]
