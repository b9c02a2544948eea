"""AdapterDrop (Rueckle et al., 2021): adapters without the lowest blocks, permanently or at random in training.

    h + A(h)   ->   h                        in the lowest n blocks (layers=n)
    h + A(h)   ->   h + [n <= block] A(h)    under train(), n drawn anew at every step (random=true); all under eval()
    fold: what the adapter itself says; with random=true none, since a step's depth is drawn

For a stack of L blocks, n is drawn uniformly from 0 ... L-1, as in the paper's robust form, once per step for all
its adapters; encoder and decoder draw independently. Other parameters that the adapter's method trains (norms) train
at every depth, as in Compacter's baseline. The parameters of layers=n have the same names as with random=true, so a
robust adapter is converted to a fixed depth by copying the remaining parameters. With layers=n no gradient is needed
below block n.
Source: arXiv 2010.11918, section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import fx

import peftgraph as pg
from peftgraph.authoring import Add, AddProduct, Builder, Match, Pass, Rule
from peftgraph.authoring.training import AdaptedSite, TrainingHooks

aten = torch.ops.aten

Build = Callable[[Match, Builder], "fx.Node | Mapping[str, fx.Node]"]


@dataclass(frozen=True, kw_only=True)
class AdapterDrop(Pass):
    """Another method's adapters, without those of the lowest blocks.

    Attributes:
        adapter: the method, without a name; a name belongs to this pass.
        layers: n, the number of blocks without adapters, from the lowest on.
        random: whether n is random in training, at least `layers`.
    """

    word = "adapter_drop"
    adapter: Pass
    layers: int = 0
    random: bool = False

    def check(self) -> None:
        """Refuse a negative depth, a pass that drops nothing, and an inner method that is named or a pipeline."""
        self.require(self.layers >= 0, f"layers must be at least 0, got {self.layers}.")
        self.require(self.layers > 0 or self.random, "it drops nothing; give layers=... or random=true.")
        self.require(self.adapter.passes() == (self.adapter,), "it takes one method, not several in one.")
        self.require(not self.adapter.name, "give the name to adapter_drop, not to the adapter inside.")

    def rules(self) -> list[Rule]:
        """Return the adapter's own rules, narrowed to the upper blocks and gated."""
        return [rule if rule.delta is None else self.dropped(rule) for rule in self.adapter.rules()]

    def training_hooks(self, sites: Sequence[AdaptedSite], steps: int) -> TrainingHooks | None:
        """Make the hooks of the adapter's own method."""
        return self.adapter.training_hooks(sites, steps)

    def dropped(self, rule: Rule) -> Rule:
        """Return a rule without its lowest blocks."""
        # every stack drops its own lowest blocks; where() says that this is meant and not an ambiguity
        at = (rule.at & ~pg.layers(0, self.layers)).where(path=".*") if self.layers else rule.at
        if not self.random:
            return replace(rule, at=at)
        self.require(
            isinstance(rule.join, Add | AddProduct),
            f"random=true needs a method that adds; {self.adapter} does not.",
        )
        reason = "its depth is random at every training step"
        assert rule.delta is not None
        return replace(rule, at=at, delta=partial(self.gated, rule.delta), fold=reason)

    def gated(self, delta: Build, m: Match, op: Builder) -> Mapping[str, fx.Node] | fx.Node:
        """Return the adapter's delta, multiplied by whether this step's depth reaches the block."""
        layer, stack = m.site.layer, m.site.stack
        blocks = [one.site.layer for one in m.related(pg.block) if one.site.stack == stack]
        if layer is None or layer not in blocks:
            raise pg.RecipeError(f"{self.word}: {m.site.id} is in no block, so it has no depth to be dropped at.")

        def draw() -> fx.Node:
            return op.call(aten.randint.low, self.layers, len(blocks), [1], device=op.device)

        def gate(value: fx.Node) -> fx.Node:
            return op.scale_in_training(value, op.call(aten.le.Scalar, op.shared_value(f"depth {stack}", draw), layer))

        made = delta(m, op)
        return gate(made) if isinstance(made, fx.Node) else {port: gate(value) for port, value in made.items()}
