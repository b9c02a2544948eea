"""Which features of a model the narrow copy of its parameters keeps: those whose weights have the largest L1 norm, or
the largest sum of Fisher information.

Features that meet are kept together: of the residual stream for all weights that read or write it, of a head for
queries and keys and for values and what reads them, of a feed-forward for what writes and reads its hidden value. Each
head keeps as many features as any other. Of heads whose queries are rotated, every R-th feature is kept, or pair of
neighbours where these are rotated, so that the pairs of a rotation stay together.
Shapes: R the reduction, H heads, G heads of keys and values, F features of one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from peftgraph.ir.tensor_table import TensorTable
from peftgraph.sites import Columns, Site, Sites

Place = tuple[str, int]  # a stored tensor and one of its axes

SIDES = {  # role -> what its output and its input features are
    "attention.q": ("keys", "stream"),
    "attention.k": ("keys", "stream"),
    "attention.v": ("values", "stream"),
    "attention.o": ("stream", "values"),
    "ffn.up": ("hidden", "stream"),
    "ffn.gate": ("hidden", "stream"),
    "ffn.down": ("stream", "hidden"),
    "norm": ("stream", ""),
}


@dataclass
class Pruning:
    """The features that are kept, found once for all parameters.

    Attributes:
        table: the base's tensors.
        sites: of the base.
        reduction: R.
        rotated: the attentions whose queries and keys are rotated, as `attention_key` gives them, each with how many
            features in a row are kept.
        fisher: gives the Fisher information of a site's weight, (O, I); None for the weights' own magnitudes.
    """

    table: TensorTable
    sites: Sites
    reduction: int
    rotated: Mapping[Hashable, int]
    fisher: Callable[[Site], Tensor] | None = None
    _heads: dict[Hashable, int] = field(default_factory=dict)
    _places: dict[Place, list[tuple[Hashable, Tensor]]] = field(default_factory=dict)
    _sides: dict[Hashable, list[tuple[Site, int]]] = field(default_factory=dict)
    _kept: dict[Hashable, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for site in self.sites:
            if site.role in ("attention.k", "attention.v") and site.head_dim:
                self._heads[SIDES[site.role][0], attention_key(site)] = site.head_dim
        for site in self.sites:
            if site.role in SIDES:
                self._record(site, *SIDES[site.role])

    def indices(self, name: str, axis: int) -> Tensor:
        """Return the entries of an axis of a stored tensor that are kept, a R-th of them, in order.

        Args:
            name: of the tensor, the first of those that are tied.
            axis: its axis.
        """
        size = self._tensor(name).shape[axis]
        found = [self._selected(group, rows) for group, rows in self._places.get((name, axis), [])]
        kept = torch.cat(found).unique() if found else torch.tensor([], dtype=torch.long)
        return kept if len(kept) == size // self.reduction else torch.arange(0, size, self.reduction)

    def _tensor(self, name: str) -> Tensor:
        entry = self.table[name]
        return (entry.tensor if entry.base_tensor is None else entry.base_tensor).detach()

    def _record(self, site: Site, out: str, inner: str) -> None:
        """Record what the axes of a site's tensors are."""
        if site.bias is not None:
            name = self.table.tied(site.bias.parameter)[0]
            self._add(name, 0, self._group(out, site, len(self._tensor(name))), _rows(site.bias.window))
        if site.scale is not None:
            name = self.table.tied(site.scale)[0]
            self._add(name, 0, self._group(out, site, self._tensor(name).numel()), None)
        weight = site.weight
        if weight is None or weight.experts or weight.axes is not None or weight.computed is not None:
            return
        name = self.table.tied(weight.parameter)[0]
        value = self._tensor(name)
        if value.dim() == 2:
            axis = int(weight.transposed)
            for side, along, rows in ((out, axis, _rows(weight.window)), (inner, 1 - axis, None)):
                group = self._group(side, site, value.shape[along])
                self._add(name, along, group, rows)
                self._sides.setdefault(group, []).append((site, along))

    def _importance(self, site: Site, along: int) -> Tensor:
        """Return the sums over one axis of a site's stored weight, of magnitudes or of Fisher information."""
        weight = site.weight
        assert weight is not None
        if self.fisher is not None:
            entries = self.fisher(site)
            entries = entries.mT if weight.transposed else entries
        else:
            entries, rows = self._tensor(weight.parameter).abs(), _rows(weight.window)
            if rows is not None:
                entries = entries.index_select(int(weight.transposed), rows.to(entries.device))
        return entries.sum(1 - along, dtype=torch.float32).cpu()

    def _group(self, side: str, site: Site, size: int) -> Hashable:
        return (side, size) if side == "stream" else (side, attention_key(site))

    def _add(self, name: str, axis: int, group: Hashable, rows: Tensor | None) -> None:
        whole = torch.arange(self._tensor(name).shape[axis]) if rows is None else rows
        known = self._places.setdefault((name, axis), [])
        if not any(one == group and torch.equal(whole, these) for one, these in known):
            known.append((group, whole))

    def _selected(self, group: Hashable, rows: Tensor) -> Tensor:
        """Return the rows of a stored tensor that are kept of a group's features."""
        kept = self._group_kept(group)
        size = self._heads.get(group)
        if size is None:
            return rows[kept[kept < len(rows)]]
        heads = len(rows) // size
        if heads == 0 or heads % len(kept):
            return torch.tensor([], dtype=torch.long)
        by_head = kept.repeat_interleave(heads // len(kept), 0)  # of G heads, each read by H / G
        return rows[: heads * size].view(heads, size).gather(1, by_head).flatten()

    def _group_kept(self, group: Hashable) -> Tensor:
        """Return the features of a group that are kept: (N,), or (G, F / R) of each head."""
        if group not in self._kept:
            self._kept[group] = self._ranked(group)
        return self._kept[group]

    def _ranked(self, group: Hashable) -> Tensor:
        sums = [self._importance(*side) for side in self._sides.get(group, [])]
        size = self._heads.get(group)
        if not sums:
            return torch.tensor([], dtype=torch.long)
        if size is None:
            whole = torch.stack([one for one in sums if len(one) == len(sums[0])]).sum(0)
            return whole.topk(len(whole) // self.reduction).indices.sort().values
        heads = max(min(len(one) for one in sums) // size, 1)
        row = self._rotated_row(group)
        by_head = [one.view(heads, -1, size).sum(1) for one in sums if len(one) % (heads * size) == 0]
        if row or not by_head:
            numbers = torch.arange(size).view(-1, row or 1)
            return numbers[:: self.reduction].flatten()[: size // self.reduction].expand(heads, -1)
        return torch.stack(by_head).sum(0).topk(size // self.reduction, dim=1).indices.sort(1).values

    def _rotated_row(self, group: Hashable) -> int:
        """Return how many features in a row of a head are kept together by its rotation; 0 where there is none."""
        side, key = cast("tuple[str, Hashable]", group)
        return self.rotated.get(key, 0) if side == "keys" else 0


def attention_key(site: Site) -> Hashable:
    """Return what the sites of one attention, or of one feed-forward, have in common."""
    family = site.role.partition(".")[0]
    return (site.stack, site.layer, site.kind if family == "attention" else None, site.expert)


def _rows(window: Columns | None) -> Tensor | None:
    """Return the rows of a window of a stored tensor; None for all."""
    return None if window is None else window.index()
