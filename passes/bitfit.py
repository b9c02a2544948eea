"""BitFit (Ben Zaken et al., 2022): only the bias vectors train.

    y = x W^T + b     ->   the same, b trains            fold: none needed, the trained b is the new b

Biases of projections and of layer norms alike; nothing is added to the graph. The program trains copies, so the base
keeps its own biases.
Source: arXiv 2106.10199, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import peftgraph as pg


@dataclass(frozen=True, kw_only=True)
class BitFit(pg.Pass):
    """Bias-term fine-tuning.

    Attributes:
        at: which biases; all by default. `bias.where(path=".*(query|intermediate).*")` narrows: the whole path must
            match.
    """

    word = "bitfit"
    at: pg.Selector = pg.bias

    def rules(self) -> list[pg.Rule]:
        """One rule: the biases train in place."""
        return [pg.Train(self.at)]
