"""Which features of which projections arrive at a value, and in which order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from peftgraph.sites.dataflow.tags import Tagger, along
from peftgraph.sites.matchers.anatomy import Anatomy
from peftgraph.sites.matchers.projections import Projection
from peftgraph.sites.site import Columns


def columns_of(projection: Projection, features: torch.Tensor) -> Columns | None:
    """Return the columns that features occupy; None where they are all in order."""
    return None if torch.equal(features, torch.arange(projection.width)) else Columns.from_indices(features)


def arrivals(
    anatomy: Anatomy, goal: fx.Node, sources: Sequence[Projection], last: bool = False
) -> tuple[torch.Tensor, list[int]]:
    """Run the features of `sources` to `goal`: the tags there, and each source's base (tag = base + feature
    + 1)."""
    seeds: dict[fx.Node, torch.Tensor] = {}
    bases: list[int] = []
    base = 0
    for source in sources:
        shape = anatomy.flow.shape(source.output)
        axes = source.axes if len(shape) == len(anatomy.flow.shape(source.node)) else (-1,)
        seeds[source.output] = along(shape, axes, base)
        bases.append(base)
        base += source.width
    return Tagger(anatomy.flow, seeds, last).run(goal), bases


def split(tags: torch.Tensor, sources: Sequence[Projection], bases: Sequence[int]) -> list[torch.Tensor]:
    """Return the features of each source among the tags, in the order of arrival."""
    return [
        tags[(base < tags) & (tags <= base + source.width)] - base - 1
        for source, base in zip(sources, bases, strict=True)
    ]


def by_row(tags: torch.Tensor, axes: Sequence[int]) -> torch.Tensor:
    """Return the tags with a head's features on the last axis."""
    last = [axis % tags.dim() for axis in axes if -tags.dim() <= axis < tags.dim()]
    if not last:
        return tags
    first = [axis for axis in range(tags.dim()) if axis not in last]
    moved = tags.permute([*first, *last])
    return moved if len(last) == 1 else moved.flatten(len(first))
