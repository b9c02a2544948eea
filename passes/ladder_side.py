"""Ladder side-tuning (Sung, Cho and Bansal, 2022): a narrow copy of the model that reads its blocks and alone trains.

    y = head(B_L(...B_1(x)))   ->   y = head(Up norm'(h_L))
    h_0 = Down_0 x,   h_i = B'_i(m_i h_(i-1) + (1 - m_i) Down_i b_i),   b_i = B_i(...B_1(x)),  m_i = sigmoid(a_i / T)
    no fold: the side network is a model of its own, which replaces what the head reads

B'_i is block B_i with 1/R of all features: of the residual stream, of each head (there are as many heads), of the
hidden value. Its operations are copied from the model's graph, and every tensor that the block stores has a narrow
copy that trains; so do tables of position biases, which stay as large as they are. Masks are the model's own. Rotary
tables are too, with every R-th frequency: those of a head that is R times smaller. Factors that are powers of the
size of a head follow it. x and b_i are detached: no gradient reaches the model, whatever trains there, and of its
activations a backward pass keeps x and the b_i of the kept blocks alone, which Down_0 and Down_i multiply. In an
encoder-decoder either stack has a ladder, and blocks of the decoder's attend to the encoder's ladder. The model's own
norm after the last block is not used; its dropout, where it has one there, falls on Up's result. Other results of the
model (an encoder's states) stay its own. Blocks without a rung (keep) have no part in the ladder, but a_i.
A program that was traced with a cache keeps the ladder's keys and values in it too, in layers behind the model's.
Shapes: D width, R reduction; Down_i (D / R, D) and Up (D, D / R), with biases, as torch.nn.Linear; a (blocks,) zero,
T = 0.1. Side weights start with rows and columns of the model's own, the same for all that read or write one value:
those with the largest L1 norms (init="prune"), or with the largest sums of Fisher information, the mean over batches of
the squared gradient (init="fisher", the paper's): program.calibrate(batches, method).apply(method).
Source: arXiv 2206.06522, section 3; ylsung/Ladder-Side-Tuning, seq2seq/third_party/models/side_t5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

import peftgraph as pg
from peftgraph.authoring import Builder, Match, Pass, Replace, Rule, omit_default
from peftgraph.authoring.modules import init
from peftgraph.authoring.narrow import NarrowCopy, Stacks, narrow_copy
from peftgraph.authoring.training import Statistic

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class LadderSide(Pass):
    """A narrow network beside the model, which reads its blocks.

    Attributes:
        reduction: R, by which every width is divided.
        keep: the layer numbers of the blocks with a rung, in every stack; none for all.
        init: "prune" (rows and columns of the model's own weights, by magnitude), "fisher" (by Fisher information,
            from data), or "random".
        temperature: T of the gates.
    """

    word = "ladder_side"
    reduction: int = 8
    keep: tuple[int, ...] | None = None
    init: Literal["prune", "fisher", "random"] = "prune"
    temperature: float = omit_default(0.1)

    def check(self) -> None:
        """Refuse a reduction below 2, a temperature of 0 or below, and layers that are none or twice."""
        self.require(self.reduction >= 2, f"reduction must be at least 2, got {self.reduction}.")
        self.require(self.temperature > 0, f"temperature must be above 0, got {self.temperature}.")
        self.require_one_of("init", ("prune", "fisher", "random"))
        numbers = self.keep if self.keep is not None else (0,)
        self.require(bool(numbers) and min(numbers) >= 0, "keep must name layers, such as (1, 3), or be none.")
        self.require(len(set(numbers)) == len(numbers), f"keep names a layer twice: {numbers}.")

    def statistics(self) -> frozenset[Statistic]:
        """Return what the start asks of data."""
        return frozenset({"fisher"} if self.init == "fisher" else ())

    def statistics_at(self) -> list[pg.Selector]:
        """Return the projections whose rows and columns are compared."""
        return [pg.parse_selector("attention.q|attention.k|attention.v|attention.o|ffn.up|ffn.gate|ffn.down")]

    def rules(self) -> list[Rule]:
        """Return two rules: replace what the norm after the last block gives, or the block where no norm follows."""
        ends: set[str] = set()

        def is_end(m: Match) -> bool:
            ends.update(ends or Stacks(m).ends())
            return m.site.id in ends

        reason = "the side network is a model of its own, which replaces what the head reads"
        return [
            Rule(at, self.delta, reason, Replace(), where=is_end, where_message="ends the blocks", optional=True)
            for at in (pg.block, pg.norm)
        ]

    def delta(self, m: Match, op: Builder) -> fx.Node:
        """Return Up norm'(h_L), (..., D)."""
        stacks = Stacks(m)
        blocks = stacks.before(m.names[m.site.ports["output"]])
        self.check_blocks(m, blocks)
        copy = narrow_copy(m, op, self.reduction, self.init)
        for start, first in stacks.inputs().items():
            if first.site in [one.site for one in blocks]:
                copy.known[start] = self.down(first, op, start, "embedded")
        for block in blocks:
            self.climb(block, op, copy)
        h = copy.value(m.names[m.site.ports["output"]])
        return self.linear(m, op, h, f"up.{stack_name(blocks[-1])}", m.features)

    def climb(self, block: Match, op: Builder, copy: NarrowCopy) -> None:
        """Compute h_i of a block with a rung; h_i of one without is h_(i-1)."""
        start, end = (block.names[block.site.ports[port]] for port in ("input", "output"))
        h = copy.value(start)
        if self.keep is not None and block.site.layer not in self.keep:
            same = start.meta["val"].shape[block.site.feature_axis] == end.meta["val"].shape[block.site.feature_axis]
            self.require(same, f"{block.site.id} changes the width, so keep must name it.")
            copy.known[end] = _laid_out(op, h, end)
            return
        gate, b = self.gate(block, op), self.down(block, op, end, str(block.site.layer))
        b = b if b.meta["val"].dim() == h.meta["val"].dim() else op.call(aten.view_as.default, b, h)
        mixed = op.add(op.mul(h, gate), op.mul(b, op.call(aten.rsub.Scalar, gate, 1.0)))
        copy.known[end] = copy.value(end, {start: mixed})

    def down(self, block: Match, op: Builder, value: fx.Node, name: str) -> fx.Node:
        """Return Down x for a value x of the model, which gets no gradient."""
        x = op.call(aten.detach.default, block.now(value))
        width = int(x.meta["val"].shape[block.site.feature_axis])
        return self.linear(block, op, x, f"down.{stack_name(block)}.{name}", width // self.reduction)

    def gate(self, block: Match, op: Builder) -> fx.Node:
        """Return m_i, one number."""
        name = stack_name(block)
        stack = [one.site.layer for one in block.related(pg.block) if stack_name(one) == name]

        def gates() -> fx.Node:
            a = op.shared_param(f"gates.{name}", (len(stack),), init.zeros)
            return op.activation("sigmoid", op.call(aten.div.Scalar, a, self.temperature))

        return op.call(aten.select.int, op.shared_value(name, gates), 0, stack.index(block.site.layer))

    def linear(self, m: Match, op: Builder, x: fx.Node, name: str, out: int) -> fx.Node:
        """Return W x + b along the features of a value, wherever they are."""
        axis = m.site.feature_axis
        x = x if axis == -1 else op.call(aten.movedim.int, x, axis, -1)
        width = int(x.meta["val"].shape[-1])
        weight = op.shared_param(f"{name}.weight", (out, width), init.kaiming)
        y = op.linear(
            op.in_dtype_of(x, weight), weight, op.shared_param(f"{name}.bias", (out,), init.uniform(width**-0.5))
        )
        return y if axis == -1 or m.site.role == "block" else op.call(aten.movedim.int, y, -1, axis)

    def check_blocks(self, m: Match, blocks: list[Match]) -> None:
        """Refuse layers that there are not, experts, and sizes that the reduction does not divide.

        Raises:
            RecipeError: it is one of these; the message names the site.
        """
        layers = {one.site.layer for one in blocks}
        unknown = sorted(set(self.keep or ()) - layers)
        self.require(not unknown, f"keep names layers {unknown}, and the model has {len(layers)}.")
        kept = {(one.site.stack, one.site.layer) for one in blocks if self.keep is None or one.site.layer in self.keep}
        for one in m.related(pg.parse_selector("block|attention.*|ffn.*|ffn.hidden|router")):
            site = one.site
            if (site.stack, site.layer) not in kept:
                continue
            experts = site.role == "router" or site.expert is not None or (site.weight and site.weight.experts)
            self.require(not experts, f"{site.id} belongs to experts, which have no narrow copy.")
            size = site.head_dim or one.features
            divides = size is None or size % self.reduction == 0
            self.require(divides, f"reduction={self.reduction} does not divide the {size} features of {site.id}.")


def stack_name(m: Match) -> str:
    """Return what a block's stack is called in the names of parameters."""
    return m.site.stack or "blocks"


def _laid_out(op: Builder, h: fx.Node, like: fx.Node) -> fx.Node:
    """Return h with its places on one axis, where a value of the model has them so."""
    if h.meta["val"].dim() == like.meta["val"].dim():
        return h
    return op.call(aten.reshape.default, h, [-1, int(h.meta["val"].shape[-1])])
