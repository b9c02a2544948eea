"""AdapterFusion (Pfeiffer et al., 2021): attention over the outputs of trained adapters, which stay frozen.

    s   ->   s + sum_n p_n V z_n        z_n = A_n(N(s)),  p = softmax_n((Q N(s) + b_q) . (K z_n + b_k))
    no fold: the mixture depends on the input

s is the residual sum at which `Pfeiffer` is applied and N its norm; A_n are the N Pfeiffer adapters of the first
stage, frozen here, without their own residuals. Scores are not divided by sqrt(D). Only Q, K and V train, in the
second stage; `take` fills in the adapters of the first, and `regulariser` is the term 0.01 ||I - V||^2 of the
authors' code.
Shapes: D features, M width. Q and K are normal with std 0.02, V is the identity plus 1e-6 off its diagonal.
value=false omits V (the library's static form).
Source: arXiv 2005.00247, section 3.2; adapter-hub/adapters, methods/modeling.py, BertFusion.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

import peftgraph as pg
from peftgraph.authoring import Add, Builder, Match, Pass, Rule
from peftgraph.authoring.modules import Bottleneck, init

aten = torch.ops.aten
PARTS = ("down_weight", "down_bias", "up_weight", "up_bias")


def near_identity(tensor: Tensor) -> None:
    """Fill a tensor with the identity plus 1e-6 off the diagonal."""
    tensor.fill_(1e-6).fill_diagonal_(1.0)


@dataclass(frozen=True, kw_only=True)
class AdapterFusion(Pass):
    """Attention over frozen adapters.

    Attributes:
        adapters: the names of the first stage's adapters, at least two.
        at: sublayers; the feed-forward by default.
        width: M of every adapter.
        activation: of every adapter; a word of `peftgraph.authoring.ACTIVATIONS`.
        dropout: on the scores, in training.
        value: whether there is a V.
    """

    word = "adapter_fusion"
    adapters: tuple[str, ...]
    at: pg.Selector = pg.ffn
    width: int = 48
    activation: str = "relu"
    dropout: float = 0.0
    value: bool = True

    def check(self) -> None:
        """Refuse fewer than two adapters, invalid or repeated names, and what a bottleneck refuses."""
        names = self.adapters
        self.require(len(names) >= 2, f"it mixes at least two adapters, got {len(names)}.")
        self.require(all(name.isidentifier() for name in names), f"names must be identifiers, got {list(names)}.")
        self.require(len(set(names)) == len(names), f"every adapter needs a name of its own, got {list(names)}.")
        Bottleneck(width=self.width, activation=self.activation, dropout=self.dropout).check(self)

    def rules(self) -> list[Rule]:
        """Return one rule: add the mixture to the residual sum."""
        return [Rule(at=self.at, delta=self.delta, join=Add("join"), fold="its mixture depends on the input")]

    def delta(self, m: Match, op: Builder) -> fx.Node:
        """Return sum_n p_n V z_n."""
        self.require_sublayer(m)
        x, d = m.normed(op, m.value("join")), m.features
        start = init.normal(0.02)
        frozen = Bottleneck(width=self.width, activation=self.activation, down=start, up=start, trainable=False)
        z_ND = op.call(aten.stack.default, [frozen.build(op, x, d, f"{name}_") for name in self.adapters], -2)

        def linear(name: str, value: fx.Node) -> fx.Node:
            weight = op.param(f"{name}_weight", (d, d), start)
            return op.linear(value, weight, op.param(f"{name}_bias", (d,), init.zeros))

        q_1D, k_ND = op.call(aten.unsqueeze.default, linear("query", x), -2), linear("key", z_ND)
        scores_N = op.dropout(op.call(aten.sum.dim_IntList, op.mul(k_ND, q_1D), [-1]), self.dropout)
        p_N1 = op.call(aten.unsqueeze.default, op.call(aten.softmax.int, scores_N, -1), -1)
        v_ND = op.linear(z_ND, op.param("value_weight", (d, d), near_identity)) if self.value else z_ND
        return op.call(aten.sum.dim_IntList, op.mul(v_ND, p_N1), [-2])

    def take(self, program: pg.Program, stages: Mapping[str, pg.Program]) -> pg.Program:
        """Copy the first stage's adapters into `program`, in place, and return it.

        Args:
            program: one that this pass was applied to.
            stages: for each name, a program with one `Pfeiffer` of this width at the same sites.

        Raises:
            RecipeError: a name or a parameter is missing, or has another shape.
        """
        self.require(stages.keys() == set(self.adapters), f"it mixes {list(self.adapters)}, got {list(stages)}.")
        own = [name for name in program.table if "_adapter_fusion." in name and name.endswith("query_weight")]
        for path in (name.removesuffix("query_weight") for name in own):
            for stage, part in ((stage, part) for stage in stages for part in PARTS):
                theirs = path.replace("_adapter_fusion.", "_pfeiffer.") + part
                source, target = stages[stage].table.get(theirs), program.table[f"{path}{stage}_{part}"].tensor
                fits = source is not None and source.tensor.shape == target.shape
                self.require(fits, f"{stage} has no {theirs} of shape {tuple(target.shape)}.")
                assert source is not None
                with torch.no_grad():
                    target.copy_(source.tensor)
        return program

    def regulariser(self, program: pg.Program) -> Tensor:
        """Return 0.01 sum ||I - V||^2 over the sites, to be added to the loss."""
        values = [p for name, p in program.table.trainable.items() if name.endswith(".value_weight")]
        self.require(bool(values), "there is no V to regularise.")
        return (
            0.01
            * torch.stack(
                [(torch.eye(len(v), dtype=v.dtype, device=v.device) - v).square().sum() for v in values]
            ).sum()
        )
