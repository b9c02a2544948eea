"""Partial fine-tuning: chosen parts train, all others stay frozen (variable-depth and layer-norm tuning).

    y = f(x; W)   ->   the same, the W of the chosen sites train          fold: none needed, the trained W is the new W

Nothing is added to the graph, and the program trains copies, so the base keeps its own weights. Nothing below the
lowest trained site needs a gradient, so a training step keeps no activations there and backpropagates no further.
top=2 trains the two uppermost blocks of each stack; at="norm" without top trains every norm. For a model with two
stacks, `at` must contain `stack("decoder")`, or `.where(path=".*")` to train the upper blocks of both.
Source: arXiv 1902.00751, section 3 (variable fine-tuning, layer norms only); arXiv 2106.09685, table 3 (FT-Top2).
"""

from __future__ import annotations

from dataclasses import dataclass

import peftgraph as pg
from peftgraph.authoring import Pass, Rule, train_parameters


@dataclass(frozen=True, kw_only=True)
class Train(Pass):
    """Training of some of the model's own parameters.

    Attributes:
        at: what trains: projections with their biases, norms, biases; every part of the model by default.
        top: how many blocks of a stack train, from the uppermost down; none for all sites that `at` selects, at any
            depth.
        head: whether the output projection trains; if it is tied to the embedding, that trains too.
    """

    word = "train"
    at: pg.Selector = ~pg.block  # every part: a block's own parameters are its parts'
    top: int | None = None
    head: bool = False

    def check(self) -> None:
        """Refuse a number of blocks below 1."""
        self.require(self.top is None or self.top >= 1, f"top must be at least 1 or none, got {self.top}.")

    def rules(self) -> list[Rule]:
        """Train the chosen parameters."""
        at = self.at if self.top is None else self.at & pg.layers(-self.top, None)
        return [train_parameters(at), train_parameters(pg.head)] if self.head else [train_parameters(at)]
