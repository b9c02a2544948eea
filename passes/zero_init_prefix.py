"""LLaMA-Adapter (Zhang et al., 2023): a prefix of keys and values, scaled by a gate that starts at zero.

    head   ->   head + g softmax(q P_K^T) P_V,     P_K = P W_k^T + b_k,  P_V = P W_v^T + b_v
    no fold: the rows are attended to, and no weight stores rows of keys or values

W_k and W_v are the model's own, frozen; the softmax over the rows is separate from the one over the tokens, and the
rows have no position. g starts at zero, so a fresh pass is the identity. The paper has a gate for each head; its
code squashes it (tanh=true), and peft has one for each layer (gate="layer"). The paper adapts the upper layers, 30
of 32: at="attention.core & layers(2,32)". peft's LLaMA-Adapter in GPT-2 adds the second term after W_o instead of
before it; that is at="attention".
Shapes: L length, D features that W_k and W_v read, P (L, D), G heads of keys, F features of one, H heads of queries,
g (H,) or (1,). P starts standard normal.
Source: arXiv 2303.16199, section 3.2, equations 5 to 8; ZrrSkywalker/LLaMA-Adapter, llama/model.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

import peftgraph as pg
from peftgraph.authoring import Builder, Match, Pass, Rule
from peftgraph.authoring.attention import attend_to, key_head_shape, per_head, value_head_shape
from peftgraph.authoring.modules import init

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class ZeroInitPrefix(Pass):
    """Rows that each attention projects itself, scaled by a gate.

    Attributes:
        at: attention cores; of self-attention by default. Whole attentions get the term after their output projection.
        length: L, how many rows.
        gate: one for each "head", or for each "layer".
        tanh: whether the gate is squashed.
    """

    word = "zero_init_prefix"
    at: pg.Selector = pg.attention.core & pg.kind("self")
    length: int = 10
    gate: Literal["head", "layer"] = "head"
    tanh: bool = False

    def check(self) -> None:
        """Refuse a length below 1 and an unknown gate."""
        self.require(self.length >= 1, f"length must be at least 1, got {self.length}.")
        self.require_one_of("gate", ("head", "layer"))

    def rules(self) -> list[Rule]:
        """Return one rule: add to the heads the queries' attention over the rows."""
        reason = "the rows are attended to, and no weight stores rows of keys or values"
        return [Rule(at=self.at, delta=self.delta, fold=reason)]

    def delta(self, m: Match, op: Builder) -> fx.Node:
        """Return g softmax(q P_K^T) P_V, in the layout of the core's heads; with the heads concatenated where the site
        is a whole attention."""
        if m.site.role != "attention":
            return self.attended(m, op)
        heads = self.attended(self.one_of(m, pg.attention.core), op)
        sizes = tuple(heads.meta["val"].shape)
        self.require(
            len(sizes) == 4 and sizes[1] * sizes[3] == m.features,
            f"{m.site.id} gives {m.features} features, and its core {' x '.join(map(str, sizes))}.",
        )
        return op.call(aten.flatten.using_ints, op.call(aten.transpose.int, heads, 1, 2), 2)

    def attended(self, m: Match, op: Builder) -> fx.Node:
        """Return g softmax(q P_K^T) P_V at a core."""
        keys, values = self.one_of(m, pg.attention.k), self.one_of(m, pg.attention.v)
        self.require(
            keys.shape[1] == values.shape[1],
            f"the keys of {m.site.id} are made of {keys.shape[1]} features and its values of {values.shape[1]}.",
        )
        rows_LD = op.param("prefix", (self.length, keys.shape[1]), init.normal(1.0))
        heads = attend_to(
            m,
            op,
            self.projected(op, keys, rows_LD, key_head_shape(m)),
            self.projected(op, values, rows_LD, value_head_shape(m)),
        )
        return per_head(m, op, heads, lambda value: op.mul(value, self.opening(op, value)))

    def opening(self, op: Builder, heads: fx.Node) -> fx.Node:
        """Return g, (H, 1, 1) or (1, 1, 1)."""
        count = int(heads.meta["val"].shape[1]) if self.gate == "head" else 1
        gate = op.param("gate", (count,), init.zeros)
        return op.call(aten.view.default, op.activation("tanh", gate) if self.tanh else gate, [count, 1, 1])

    def one_of(self, m: Match, role: pg.Selector) -> Match:
        """Return the one projection of an attention's keys or values, or its core."""
        found = [one for one in m.related(role, same_layer=True) if one.site.kind == m.site.kind]
        self.require(len(found) == 1, f"{m.site.id} has {len(found)} sites at {role}, and the rows go through one.")
        return found[0]

    def projected(self, op: Builder, one: Match, rows_LD: fx.Node, sizes: tuple[int, int]) -> fx.Node:
        """P W^T + b, (1, G, L, F)."""
        heads, features = sizes
        self.require(
            one.shape[0] == heads * features,
            f"{one.site.id} gives {one.shape[0]} features for {heads} heads of {features}.",
        )
        bias = None if one.bias is None else one.read(op, one.bias)
        flat_LO = op.linear(rows_LD, one.read(op, one.weight), bias)
        apart_1LGF = op.call(aten.view.default, flat_LO, [1, self.length, heads, features])
        return op.call(aten.transpose.int, apart_1LGF, 1, 2)
