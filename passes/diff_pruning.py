"""DiffPruning (Guo et al., 2021): a sparse difference from the pretrained weights, learned through L0 gates.

    W -> W + g,   g = z z' w                    entry by entry; z' is one number for each matrix or vector
    z = clamp((r - l) sigmoid(log u - log(1 - u) + a) + l, 0, 1),  u uniform in (0, 1), drawn anew at each step
    in evaluation                   z = clamp((r - l) sigmoid(a) + l, 0, 1)
    loss += penalty * sum of P(z > 0) P(z' > 0),   P(z > 0) = sigmoid(a - log(-l / r)),   l = -1.5, r = 1.5
    fold: W <- W + g; entries whose g is zero keep their bits

w starts at zero and a at 5, so a fresh pass is the identity. z' has an a of its own (structured=false leaves it out).
After all but `final` of the steps the `target` share of all entries with the largest |g| is kept: w <- g there, and the
gates are fixed at 0 and 1. The last `final` steps train what was kept. Adapters are saved as its values and places.
Trainable are w and a, two for each entry of the base: choose the sites by memory. The authors' code adds P(z' > 0) once
for each matrix instead of the product: form="code".
Source: arXiv 2012.07463, sections 3.1 to 3.3; dguo98/DiffPruning.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx

import peftgraph as pg
from peftgraph.authoring import Builder, Match, ParameterValue, Params, Pass, Rule, omit_default
from peftgraph.authoring.modules import difference_rules, init
from peftgraph.authoring.training import AdaptedSite, TrainingHooks, agreed, assign, full

aten = torch.ops.aten
EVERYTHING = pg.parse_selector("attention.*|ffn.*|bias|norm")
LOW, HIGH = -1.5, 1.5
SMALLEST_DRAW = 1e-4
SURE = 1e4  # |a| of a gate that is fixed: its sigmoid is 0 or 1 whatever is drawn
W, A, GROUP = "diff_w", "diff_a", "diff_group"


@dataclass(frozen=True, kw_only=True)
class DiffPruning(Pass):
    """A sparse difference of the weights.

    Attributes:
        at: projections, norms and biases; all of the blocks by default. Embeddings and the head can be added.
        target: the share of entries that may differ in the end.
        penalty: the weight of the expected number of entries that differ, in the loss.
        final: how many steps train after the entries are chosen.
        structured: whether each matrix and vector has a gate of its own besides those of its entries.
        form: how the gates of matrices count in the loss: "paper" or "code".
    """

    word = "diff_pruning"
    at: pg.Selector = EVERYTHING
    target: float = 0.005
    penalty: float = 1.25e-7
    final: int = 0
    structured: bool = True
    form: Literal["paper", "code"] = omit_default("paper")

    def check(self) -> None:
        """Refuse a share outside (0, 1], a negative penalty or number of steps, and an unknown form."""
        self.require(0 < self.target <= 1, f"target must lie in (0, 1], got {self.target}.")
        self.require(self.penalty >= 0, f"penalty must be at least 0, got {self.penalty}.")
        self.require(self.final >= 0, f"final is a number of steps, at least 0, got {self.final}.")
        self.require_one_of("form", ("paper", "code"))

    def rules(self) -> list[Rule]:
        """Add the difference to weights, to scales of norms, and to biases."""
        return difference_rules(self.at, self.difference, self.added, self.count_changed)

    def difference(self, m: Match, op: Builder, stored: ParameterValue) -> fx.Node:
        """Compute z z' w."""
        w, a = op.param(W, stored.shape, init.zeros), op.param(A, stored.shape, init.constant(5.0))
        found = op.mul(self.gate(op, a), w)
        if not self.structured:
            return found
        return op.mul(found, self.gate(op, op.param(GROUP, (1,), init.constant(5.0)), "z'"))

    def gate(self, op: Builder, a: fx.Node, symbol: str = "z") -> fx.Node:
        """Compute z, with noise in training alone."""
        u = op.call(aten.clamp.default, op.uniform_noise(a), SMALLEST_DRAW, 1 - SMALLEST_DRAW)
        noisy = self.stretched(op, op.add(a, op.call(aten.logit.default, u)))
        return op.symbol(op.by_mode(self.stretched(op, a), noisy), symbol)

    @staticmethod
    def stretched(op: Builder, logit: fx.Node) -> fx.Node:
        """Compute clamp((r - l) sigmoid(logit) + l, 0, 1)."""
        wide = op.call(aten.add.Scalar, op.mul(op.activation("sigmoid", logit), HIGH - LOW), LOW)
        return op.call(aten.clamp.default, wide, 0, 1)

    def added(self, stored: ParameterValue, p: Params) -> Tensor:
        """Compute W + g, where g is not zero."""
        g = difference(p)
        return torch.where(g == 0, stored.value, stored.value + g)

    def count_changed(self, p: Params) -> int:
        """Return how many entries differ; before the choice, how many may in the end."""
        if p[W].device.type == "meta" or not is_fixed(p):
            return max(1, int(self.target * p[W].numel()))
        return int((difference(p) != 0).sum())

    def file_bytes(self, parameters: Mapping[str, Tensor]) -> int:
        """Return the bytes of the values and places of the entries that may differ."""
        if W not in parameters:
            return 0
        w = parameters[W]
        return max(1, int(self.target * w.numel())) * (w.element_size() + place_dtype(w.numel()).itemsize)

    def training_hooks(self, sites: Sequence[AdaptedSite], steps: int) -> TrainingHooks:
        """Make the hooks that add the term of the loss and choose the entries."""
        self.require(
            self.final < steps, f"final={self.final} leaves none of {steps} steps to learn which entries differ."
        )
        return MagnitudePruning(self, sites, steps)

    def pack(self, parameters: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the values and places of what was chosen; everything before the choice."""
        if not is_fixed(parameters):
            return parameters
        kept = (parameters[A] == SURE).flatten()
        places = kept.nonzero()[:, 0]
        return {"diff_values": parameters[W].flatten()[kept], "diff_places": places.to(place_dtype(kept.numel()))}

    def unpack(self, packed: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Invert `pack`."""
        if W in packed:
            return packed
        w, a = torch.zeros_like(like[W]), torch.full_like(like[A], -SURE)
        places = packed["diff_places"].long()
        w.view(-1)[places], a.view(-1)[places] = packed["diff_values"].to(w.dtype), SURE
        return {W: w, A: a} | ({GROUP: torch.full_like(like[GROUP], SURE)} if GROUP in like else {})


def place_dtype(size: int) -> torch.dtype:
    """Return the smallest dtype that numbers that many entries."""
    return torch.int16 if size <= 2**15 else torch.int32 if size <= 2**31 else torch.int64


def expected_gate(a: Tensor) -> Tensor:
    """Return z without noise."""
    return (torch.sigmoid(a) * (HIGH - LOW) + LOW).clamp(0, 1)


def difference(p: Mapping[str, Tensor]) -> Tensor:
    """Return g without noise."""
    g = expected_gate(p[A]) * p[W]
    return g * expected_gate(p[GROUP]) if GROUP in p else g


def is_fixed(p: Mapping[str, Tensor]) -> bool:
    """Tell whether the entries that differ are chosen."""
    return bool((p[A].abs() == SURE).all())


class MagnitudePruning(TrainingHooks):
    """The expected number of entries that differ; then the choice of the largest differences."""

    def __init__(self, method: DiffPruning, sites: Sequence[AdaptedSite], steps: int) -> None:
        self.method, self.last = method, steps - method.final - 1
        self.parts = list({id(one.parameters[W]): one.parameters for one in sites}.values())
        self.chosen = False

    def penalty(self, step: int) -> Tensor | None:
        """Compute penalty * expected number of entries that differ."""
        if self.chosen or not self.method.penalty:
            return None
        terms: list[Tensor] = []
        for sharded in self.parts:
            part = {name: full(value) for name, value in sharded.items()}
            entries = torch.sigmoid(part[A] - math.log(-LOW / HIGH)).sum()
            if GROUP in part:
                group = torch.sigmoid(part[GROUP] - math.log(-LOW / HIGH)).sum()
                entries = entries * group if self.method.form == "paper" else entries + group
            terms.append(entries)
        return self.method.penalty * torch.stack(terms).sum()

    def after_step(self, step: int) -> None:
        """Choose the entries once; afterwards keep the gates where they are."""
        if step == self.last:
            self.choose()
        elif self.chosen:
            for part in self.parts:
                self.fix(part, full(part[A]) > 0)

    @torch.no_grad()
    def choose(self) -> None:
        """Keep the entries with the largest |g| of all sites together, and fix all gates."""
        found = [difference({name: full(value) for name, value in part.items()}) for part in self.parts]
        sizes = torch.cat([g.abs().flatten().float() for g in found])
        count = max(1, int(self.method.target * sizes.numel()))
        kept = torch.zeros_like(sizes, dtype=torch.bool)
        kept[torch.topk(sizes, count).indices] = True
        kept &= sizes > 0
        kept = agreed(kept)
        for part, g, own in zip(self.parts, found, kept.split([g.numel() for g in found]), strict=True):
            assign(part[W], torch.where(own.reshape(g.shape), g, 0))
            self.fix(part, own.reshape(g.shape))
        self.chosen = True

    @staticmethod
    @torch.no_grad()
    def fix(part: Mapping[str, Tensor], kept: Tensor) -> None:
        """Fix the gates at 0 and 1."""
        assign(part[A], torch.where(kept, SURE, -SURE).to(part[A].dtype))
        if GROUP in part:
            assign(part[GROUP], torch.full_like(full(part[GROUP]), SURE))

    def state_dict(self) -> dict[str, Tensor]:
        """Return whether the entries are chosen; which ones, the gates say."""
        return {"chosen": torch.tensor(self.chosen)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore it."""
        self.chosen = bool(state["chosen"])
