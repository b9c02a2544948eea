"""Parallel and scaled parallel adapters (He et al., 2022): a bottleneck in parallel to a sublayer.

    h = drop(F(x))   ->   h + s (W_up drop(act(W_down x + b_down)) + b_up)
    no fold: the adapter is nonlinear, so no weight can express it

x is the sublayer's input: in a pre-norm block that is the norm's output according to the paper (input="normed"),
while the authors' mBART and the adapters library pass the residual stream itself to the adapter (input="residual");
in a post-norm block the two are the same. s is fixed, 4 for summarisation and translation and 2 for GLUE, or
learned, which the authors start at 1. The authors' attention form adds to the heads before the output projection,
with a layer norm of its own on x and s = 1: at="attention.o" layer_norm=true scale=1.
Shapes: D features of x, O features of h (of the heads at attention.o), M width. init="lora": W_down uniform in
+-1/sqrt(D), W_up zero, so a fresh pass is the identity; "bert": both normal with std 0.02. Biases are zero.
Source: arXiv 2110.04366, section 3.3 and table 2; jxhe/unify-parameter-efficient-tuning, petl/petl_factory.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

import peftgraph as pg
from peftgraph.authoring import Builder, Match, Pass, Rule
from peftgraph.authoring.modules import Bottleneck, init

aten = torch.ops.aten

STARTS = {"lora": (init.kaiming, init.zeros), "bert": (init.normal(0.02), init.normal(0.02))}
INPUTS = {"normed": "input", "residual": "residual"}


@dataclass(frozen=True, kw_only=True)
class ParallelAdapter(Pass):
    """A bottleneck in parallel to a sublayer.

    Attributes:
        at: sublayers, the feed-forward by default; or attention.o, to add to the heads before the output projection.
        width: M, the size of the bottleneck.
        scale: s, or its initial value if it is learned.
        learned: whether s trains.
        input: "normed" or "residual".
        layer_norm: whether the adapter has a layer norm of its own on x.
        activation: a word of `peftgraph.authoring.ACTIVATIONS`.
        dropout: on the bottleneck, in training.
        init: "lora" or "bert".
    """

    word = "parallel_adapter"
    at: pg.Selector = pg.ffn
    width: int = 512
    scale: float = 4.0
    learned: bool = False
    input: Literal["normed", "residual"] = "normed"
    layer_norm: bool = False
    activation: str = "relu"
    dropout: float = 0.0
    init: Literal["lora", "bert"] = "lora"

    def check(self) -> None:
        """Refuse unknown words, and what a bottleneck refuses."""
        self.require_one_of("init", STARTS)
        self.require_one_of("input", INPUTS)
        self.bottleneck.check(self)

    @property
    def bottleneck(self) -> Bottleneck:
        """W_up drop(act(W_down x + b_down)) + b_up."""
        down, up = STARTS[self.init]
        return Bottleneck(width=self.width, activation=self.activation, dropout=self.dropout, down=down, up=up)

    def rules(self) -> list[Rule]:
        """Return one rule: add the scaled bottleneck of the sublayer's input to its output, or to the heads."""
        reason = "it is nonlinear, so no weight can express it"
        return [Rule(at=self.at, delta=self.delta, fold=reason, gate_input=self.read)]

    def read(self, m: Match, op: Builder) -> fx.Node:
        """Return x."""
        sublayer = self.sublayer(m) if m.site.role == "attention.o" else m
        return sublayer.value(INPUTS[self.input])

    def delta(self, m: Match, op: Builder) -> Mapping[str, fx.Node]:
        """Return s times the bottleneck of x, by the port where it enters."""
        heads = m.site.role == "attention.o"
        sublayer = self.sublayer(m) if heads else m
        self.require_sublayer(sublayer)
        x = self.read(m, op)
        features = m.shape[1] if heads else m.features
        if self.layer_norm:
            width = int(x.meta["val"].shape[-1])
            scale_D = op.param("norm_weight", (width,), init.ones)
            x = op.layer_norm(x, scale_D, op.param("norm_bias", (width,), init.zeros))
        delta = self.bottleneck.build(op, x, features)
        s = op.param("scale", (1,), init.constant(self.scale)) if self.learned else self.scale
        delta = op.mul(delta, s)
        if heads and m.input.meta["val"].dim() == 2:  # some projections read all rows of the batch as one matrix
            delta = op.call(aten.flatten.using_ints, delta, 0, -2)
        return {"input" if heads else "output": delta}

    def sublayer(self, m: Match) -> Match:
        """Return the attention that m is the output projection of."""
        same = [one for one in m.related(pg.attention, same_layer=True) if one.site.kind == m.site.kind]
        self.require(len(same) == 1, f"{len(same)} attentions of its kind share the layer of {m.site.id}, not one.")
        return same[0]
