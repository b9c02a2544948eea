"""Intrinsic SAID and DID (Aghajanyan et al., 2020): one short vector trains, and moves all tensors.

    W_i -> W_i + l_i P_i(v)     v (d,) is one for all tensors; P_i is the Fastfood transform onto the entries of W_i
    fold: W_i <- W_i + l_i P_i(v)

v starts at zero and every l_i at 1, so a fresh pass is the identity. SAID trains v and one l_i for each tensor,
`dimension` numbers in all, so that v has `dimension` less the number of tensors; with layer_scales=false (DID) v has
them all and there is no l. Signs, permutations and normal numbers are drawn from `seed` and the name of the tensor,
the same on every machine; they are drawn anew when an adapter is loaded, whose file holds v and l alone. A transform
has as many entries as the tensor or v, up to the next power of two, so that each tensor sees all of v; the authors'
code cuts v for short tensors. In memory are three numbers for each entry of the base. A part of a fused weight is a
tensor of its own.
Source: arXiv 2012.13255, section 3, eq. 2 and 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

import peftgraph as pg
from peftgraph.authoring import Builder, Match, ParameterValue, Params, Pass, Rule
from peftgraph.authoring.modules import (
    FastfoodDraw,
    difference_rules,
    draw_fastfood,
    fastfood,
    init,
    is_matrix,
    is_vector,
    run,
    stored_vector,
)

EVERYTHING = pg.parse_selector("attention.*|ffn.*|bias|norm")


@dataclass(frozen=True, kw_only=True)
class IntrinsicSAID(Pass):
    """Training in a random subspace.

    Attributes:
        at: projections, norms and biases; all of the blocks by default. Embeddings and the head can be added.
        dimension: how many numbers train; the paper tries 10 to 10,000, and its SAID needs 200 to 2,000 on GLUE.
        layer_scales: whether each tensor has a scale (SAID) or not (DID).
        seed: of the random directions.
    """

    word = "intrinsic_said"
    at: pg.Selector = EVERYTHING
    dimension: int = 1000
    layer_scales: bool = True
    seed: int = 0

    def check(self) -> None:
        """Refuse a dimension below 1 and a seed below 0."""
        self.require(self.dimension >= 1, f"dimension must be at least 1, got {self.dimension}.")
        self.require(self.seed >= 0, f"seed must be at least 0, got {self.seed}.")

    def rules(self) -> list[Rule]:
        """Add the projection of v to weights, to scales of norms, and to biases."""
        return difference_rules(self.at, self.difference, self.added)

    def difference(self, m: Match, op: Builder, stored: ParameterValue) -> fx.Node:
        """Compute l P(v), in the shape of the tensor."""
        v = op.shared_param("said_v", (self.length(m),), init.zeros)
        drawn = self.draw(stored, self.length(m), op.device)
        parts = {name: op.constant(f"said_{name}", getattr(drawn, name)) for name in ("signs", "order", "normal")}
        parts["hadamard"] = op.constant("said_hadamard", drawn.hadamard)
        nodes = {name: part if name == "order" else op.in_dtype_of(part, v) for name, part in parts.items()}
        size = math.prod(stored.shape)
        g = fastfood(op.call, v, self.length(m), size, replace(drawn, **nodes))
        g = op.symbol(op.call(torch.ops.aten.view.default, g, list(stored.shape)), "P(v)")
        return op.mul(g, op.param("said_l", (1,), init.ones)) if self.layer_scales else g

    def draw(self, stored: ParameterValue, length: int, device: torch.device) -> FastfoodDraw:
        """Draw the random parts of a tensor's transform."""
        return draw_fastfood(self.seed, str(stored.view), math.prod(stored.shape), length, device)

    def length(self, m: Match) -> int:
        """Return the length of v.

        Raises:
            RecipeError: the scales of the tensors are all that `dimension` allows.
        """
        if not self.layer_scales:
            return self.dimension
        tensors = len({self.tensor(one) for one in m.related(self.at) if is_matrix(one) or is_vector(one)})
        self.require(
            self.dimension > tensors,
            f"dimension={self.dimension} must be larger than the number of tensors, {tensors}, each of which has a "
            "scale; layer_scales=false has none.",
        )
        return self.dimension - tensors

    @staticmethod
    def tensor(m: Match) -> tuple[str, str]:
        """Return what a site owns of a stored tensor, by the first of the names that are tied to it."""
        view = (m.weight if is_matrix(m) else stored_vector(m)).view
        return m.table.tied(view.parameter)[0], str(view.window)

    def added(self, stored: ParameterValue, p: Params) -> Tensor:
        """Compute W + l P(v)."""
        v = p.said_v
        drawn = self.draw(stored, len(v), v.device)
        parts = {name: getattr(drawn, name).to(v.dtype) for name in ("signs", "normal", "hadamard")}
        g = fastfood(run, v, len(v), math.prod(stored.shape), replace(drawn, **parts)).view(stored.shape)
        return stored.value + (g * p.said_l if self.layer_scales else g)
