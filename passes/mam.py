"""The mix-and-match adapter (He et al., 2022): a short prefix at every attention, a wide parallel adapter at the FFN.

    head = softmax(q K^T) V   ->   softmax(q [P_K; K]^T) [P_V; V]
    h = drop(FFN(x))          ->   h + s (W_up relu(W_down x + b_down) + b_up)
    no fold: the prefix is attended to, and the adapter is nonlinear

A pipeline of `Prefix` and `ParallelAdapter`, which appear separately in a program's history and an adapter
directory. The paper has L = 30, M = 512 and s = 4 for summarisation and translation, L = 16, M = 16 and s = 2 for
GLUE; its code has 800 hidden features in the prefix's MLP. adapters' MAMConfig halves the width of the model instead
(M = D / 2).
Shapes: L length of the prefix, M width of the adapter.
Source: arXiv 2110.04366, section 4.6; jxhe/unify-parameter-efficient-tuning, exps/run_xsum.sh.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import peftgraph as pg
from peftgraph.authoring import Pass, Rule

from .parallel_adapter import ParallelAdapter
from .prefix import Prefix


@dataclass(frozen=True, kw_only=True)
class MAM(Pass):
    """Prefix and parallel adapter.

    Attributes:
        attention: the attention cores that get a prefix.
        ffn: the sublayers that get an adapter.
        length: L of the prefix.
        hidden: of the prefix's MLP; none trains its rows themselves.
        width: M of the adapter.
        scale: s of the adapter.
        input: what the adapter reads in a pre-norm block: "normed" or "residual".
    """

    word = "mam"
    attention: pg.Selector = pg.attention.core
    ffn: pg.Selector = pg.ffn
    length: int = 30
    hidden: int | None = 800
    width: int = 512
    scale: float = 4.0
    input: Literal["normed", "residual"] = "normed"

    def check(self) -> None:
        """Refuse what either part refuses."""
        self.passes()

    def passes(self) -> tuple[Pass, ...]:
        """Return the prefix pass and the adapter pass."""
        prefix = Prefix(at=self.attention, length=self.length, hidden=self.hidden, name=self.name)
        adapter = ParallelAdapter(at=self.ffn, width=self.width, scale=self.scale, input=self.input, name=self.name)
        return (prefix, adapter)

    def rules(self) -> list[Rule]:
        """Return the rules of both parts."""
        return [rule for part in self.passes() for rule in part.rules()]
