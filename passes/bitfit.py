"""BitFit (Ben Zaken et al., 2022): only the bias vectors train.

    y = x W^T + b     ->   the same, b trains            fold: none needed, the trained b is the new b
    y = x W^T + b     ->   y = x W^T + b + d             for one slice of a fused projection; fold: b <- b + d there
    y = x W^T         ->   y = x W^T + d                 with zero=true; no fold: there is no b to fold d into

`at` selects biases, or the projections and norms that they belong to. The program trains copies, so the base keeps
its own biases, and d starts at zero. The paper's smaller set is at="attention.q|ffn.up". With zero=true models
without biases get zero ones, as in T-Few's T5: at="attention.*|ffn.up|ffn.gate" norms=true, without the second
matrix of the feed-forward, which the pattern in the authors' configuration misses (at="attention.*|ffn.*" includes
it). The authors' code trains the task's classifier too: head=true.
Source: arXiv 2106.10199, section 3; arXiv 2205.05638 and r-three/t-few, configs/bitfit.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, fx

import peftgraph as pg
from peftgraph.authoring import Builder, Match, ParameterValue, Params, Pass, Rule, omit_default, train_parameters
from peftgraph.authoring.modules import init


def in_a_slice(m: Match) -> bool:
    """Tell whether the bias is a part of a longer stored one."""
    return m.site.bias is not None and m.site.bias.window is not None


def missing(m: Match) -> bool:
    """Tell whether there is no bias."""
    return m.site.bias is None


def whole(m: Match) -> bool:
    """Tell whether the bias is a whole stored tensor."""
    return not missing(m) and not in_a_slice(m)


@dataclass(frozen=True, kw_only=True)
class BitFit(Pass):
    """Bias-term fine-tuning.

    Attributes:
        at: which biases; all by default. `bias.where(path=".*(query|intermediate).*")` narrows: the whole path must
            match.
        zero: whether a projection or norm without a bias gets one that starts at zero.
        norms: whether the scales of all norms train too.
        head: whether the output projection trains too; if it is tied to the embedding, that trains too.
    """

    word = "bitfit"
    at: pg.Selector = pg.bias
    zero: bool = omit_default(False)
    norms: bool = omit_default(False)
    head: bool = omit_default(False)

    def rules(self) -> list[Rule]:
        """Train the biases in place, or beside a slice; add those that are missing."""
        no_bias = "there is no bias to fold it into"
        biases = [
            train_parameters(self.at, bias_only=True, where=whole, optional=True),
            Rule(at=self.at, delta=self.delta, fold=self.fold, where=in_a_slice, optional=True),
        ]
        added = Rule(at=self.at, delta=self.delta, fold=no_bias, where=missing, optional=True)
        also = [train_parameters(at) for at, wanted in ((pg.norm, self.norms), (pg.head, self.head)) if wanted]
        return [*biases, *([added] if self.zero else []), *also]

    def delta(self, m: Match, op: Builder) -> fx.Node:
        """Return d in a shape that broadcasts over the value."""
        return m.along_features(op, op.param("bitfit_d", (*m.experts, m.features), init.zeros))

    def fold(self, m: Match, p: Params) -> Mapping[ParameterValue, Tensor]:
        """Return b + d."""
        assert m.bias is not None
        return {m.bias: m.bias.value + p.bitfit_d}
