"""Frozen batch statistics: batch norms use the base's running statistics while everything else trains.

    y = (x - E[x]) / sqrt(Var[x] + eps) * w + b, running statistics follow   ->   y = (x - m) / sqrt(v + eps) * w + b
    in training; in evaluation nothing changes          fold: nothing to write, the base's own m and v stay

Shapes: x (N, C, ...); m, v, w and b (C,). Without this pass the running statistics that training writes belong to the
adapted program: they are saved with it and written back with its fold.
Source: torch.nn.BatchNorm2d under eval(); arXiv 1502.03167, algorithm 2 (inference).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

import peftgraph as pg
from peftgraph.authoring import Builder, Match, ParameterValue, Params, Pass, Replace, Rule

aten = torch.ops.aten

BATCH_NORMS = (aten.batch_norm.default, aten.instance_norm.default)
USES_BATCH = 5  # the position of the argument that says whether they use the statistics of the batch


@dataclass(frozen=True, kw_only=True)
class FreezeStatistics(Pass):
    """Batch norms that only read their running statistics.

    Attributes:
        at: norms; all by default. Norms without running statistics are unchanged.
    """

    word = "freeze_statistics"
    at: pg.Selector = pg.norm

    def rules(self) -> list[Rule]:
        """Return one rule: replace the norm by its form in evaluation, which updates no statistics."""
        where_message = "keeps running statistics"
        join = Replace(exclusive=False)
        return [
            Rule(
                at=self.at,
                delta=self.delta,
                join=join,
                fold=self.fold,
                where=self.keeps,
                where_message=where_message,
                training_only=True,
            )
        ]

    def keeps(self, m: Match) -> bool:
        """Tell whether a norm keeps running statistics."""
        node = m.names[m.site.op]
        return node.target in BATCH_NORMS and node.args[3] is not None

    def delta(self, m: Match, op: Builder) -> fx.Node:
        """Return x normalised by the running statistics."""
        norm = m.names[m.site.op]
        assert not isinstance(norm.target, str)
        before, after = norm.args[1:USES_BATCH], norm.args[USES_BATCH + 1 :]
        fixed = op.call(norm.target, m.input, *before, False, *after)
        for node in (norm, *self.counts(m, norm)):
            op.disable_write(node)
        return op.disable_write(fixed)

    def counts(self, m: Match, norm: fx.Node) -> list[fx.Node]:
        """Return the nodes that count the batches seen by the running statistics of a norm."""
        mean = norm.args[3]
        assert isinstance(mean, fx.Node)
        beside = str(mean.target).rpartition(".")[0]
        found = [
            user
            for node in m.graph.find_nodes(op="get_attr")
            if str(node.target).rpartition(".")[0] == beside and not node.meta["val"].is_floating_point()
            for user in node.users
        ]
        return [user for user in found if user.target is aten.add_.Tensor]

    def fold(self, m: Match, p: Params) -> Mapping[ParameterValue, Tensor]:
        """Return no changes: the stored tensors stay as they are."""
        return {}
