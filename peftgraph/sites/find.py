"""Find the sites of a graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from types import MappingProxyType

import torch
from torch import fx

from peftgraph.sites.origin import Origin
from peftgraph.sites.patterns.pattern import Pattern
from peftgraph.sites.search import Search
from peftgraph.sites.sites import Sites


def find_sites(
    graph: fx.Graph,
    tensors: Mapping[str, torch.Tensor],
    sizes: Mapping[str, str] = MappingProxyType({}),
    *,
    patterns: Sequence[Pattern] = (),
    parameters: Set[str] | None = None,
) -> Sites:
    """Find the sites of a canonical graph. Structure is the only evidence; paths are for display.

    Args:
        graph: what to search.
        tensors: the parameters and buffers its get_attr nodes name.
        sizes: the printed names of symbolic sizes, for explanations.
        patterns: sites of one's own to look for as well.
        parameters: the names in `tensors` that are parameters and no buffers; all of them by default.
    """
    found = Search(graph, tensors, patterns, parameters)
    origin = Origin.of(graph, tensors, sizes)
    return Sites(found.sites, tuple(found.structure.misses), found.searched, origin, found.absent)
