"""The parameters of a narrow copy, and how they start."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor, fx

from peftgraph.ir.builder import Builder
from peftgraph.rewrite.match import Match
from peftgraph.rewrite.modules import init
from peftgraph.rewrite.narrow.copying import NarrowCopy
from peftgraph.rewrite.narrow.pruning import Pruning
from peftgraph.rewrite.narrow.scores import Scores
from peftgraph.rewrite.narrow.sizes import Scaling
from peftgraph.rewrite.narrow.stacks import Stacks
from peftgraph.sites import Site

Start = Literal["prune", "fisher", "random"]


@dataclass
class SideParameters:
    """Makes the parameters of a narrow copy: `prefix` and the base's name.

    Attributes:
        m, op: of the edit.
        pruning: which entries of the base's tensors are kept.
        start: "prune" or "fisher" for these entries; "random" for matrices as in torch.nn.Linear and zero biases, in
            which other vectors, such as scales of norms, start as with "prune".
        prefix: of the names.
    """

    m: Match
    op: Builder
    pruning: Pruning
    start: Start
    prefix: str = "copy"

    def __call__(self, name: str, axes: tuple[int, ...], shape: tuple[int, ...]) -> fx.Node:
        """Make the copy of a stored parameter that is narrow on some axes, and read it."""

        def fill(value: Tensor) -> None:
            if self.start == "random" and axes and len(shape) > 1:
                init.uniform(self._inner(name, shape) ** -0.5)(value)
            elif self.start == "random" and name in self._biases:
                value.zero_()
            else:
                value.copy_(self._kept(name, axes))

        return self.op.shared_param(f"{self.prefix}.{name}", shape, fill)

    def _kept(self, name: str, axes: tuple[int, ...]) -> Tensor:
        """Return the entries of a stored tensor that are kept."""
        entry = self.m.table[name]
        value = (entry.tensor if entry.base_tensor is None else entry.base_tensor).detach()
        for axis in axes:
            value = value.index_select(axis, self.pruning.indices(name, axis).to(value.device))
        return value

    def _inner(self, name: str, shape: tuple[int, ...]) -> int:
        """Return how many input features a narrow matrix has."""
        weights = [site.weight for site in self.m.sites if site.weight is not None]
        turned = any(one.transposed and one.parameter in self.m.table.tied(name) for one in weights)
        return shape[0] if turned else shape[-1]

    @property
    def _biases(self) -> set[str]:
        return {
            self.m.table.tied(site.bias.parameter)[0]
            for site in self.m.sites
            if site.bias is not None and site.role not in ("norm", "bias")
        }


def narrow_copy(m: Match, op: Builder, reduction: int, start: Start) -> NarrowCopy:
    """Return what makes narrow copies of the model's values, before any is made.

    Args:
        m: any match in the model.
        op: the builder of the edit.
        reduction: R, by which every width is divided.
        start: what its parameters start as.
    """
    scores = Scores(m)
    heads = {site.head_dim for site in m.sites if site.head_dim}

    def fisher(site: Site) -> Tensor:
        return replace(m, site=site).statistic("fisher")

    pruning = Pruning(m.table, m.sites, reduction, scores.rotated, fisher if start == "fisher" else None)
    starts = Stacks(m).inputs()
    return NarrowCopy(m, op, Scaling(reduction, heads, scores.has), SideParameters(m, op, pruning, start), starts)
