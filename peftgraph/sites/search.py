"""The search for sites: what a graph is made of, and the finders of the registry's roles one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from functools import cache
from importlib import import_module
from typing import Protocol, cast

import torch
from torch import fx

from peftgraph.sites.assign.absent import find_absent
from peftgraph.sites.assign.evidence import Step
from peftgraph.sites.assign.structure import Structure
from peftgraph.sites.finders import patterns as own_patterns
from peftgraph.sites.finders.patterns import PatternSearch
from peftgraph.sites.patterns.pattern import Pattern
from peftgraph.sites.roles import ROLES, role_of
from peftgraph.sites.site import Absent, NearMiss, Site


class Explainer(Protocol):
    """What every module of `peftgraph.sites.finders` can say of the roles that it finds."""

    def evidence(self, structure: Structure, site: Site, node: fx.Node) -> list[Step]:
        """Say why a site is one, from its operator outward."""
        ...

    def near_misses(self, structure: Structure, role: str) -> Iterator[NearMiss]:
        """Find what came closest to a role that nothing plays, beyond what the search recorded."""
        ...


class Finder(Explainer, Protocol):
    """A module of `peftgraph.sites.finders` that a record of the registry names."""

    def find(self, structure: Structure) -> None:
        """Add the sites of its roles to `structure.into`."""
        ...


def finders() -> tuple[Finder, ...]:
    """Return the finders of all roles, each once, in the order of the registry."""
    return tuple(_module(name) for name in dict.fromkeys(one.finder for one in ROLES))


def finder_of(role: str) -> Explainer:
    """Return what explains the sites of a role: the module that found them; for a pattern's roles, that of patterns."""
    known = role_of(role)
    return cast(Explainer, own_patterns) if known is None else _module(known.finder)


@cache
def _module(name: str) -> Finder:
    return cast(Finder, import_module(f"peftgraph.sites.finders.{name}"))


class Search:
    """Search one graph, once.

    Attributes:
        structure: what the graph is made of.
        sites: the sites, in graph order.
        searched: what became of each pattern.
        absent: the sites that attentions lack that others have.
    """

    def __init__(
        self,
        graph: fx.Graph,
        tensors: Mapping[str, torch.Tensor],
        patterns: Sequence[Pattern] = (),
        parameters: Set[str] | None = None,
    ) -> None:
        with torch.device("cpu"):  # tags are real numbers, whatever device the caller made the default
            self.structure = Structure(graph, tensors, parameters)
            for finder in finders():
                finder.find(self.structure)
            self.searched: tuple[PatternSearch, ...] = tuple(
                own_patterns.find(self.structure, pattern) for pattern in patterns
            )
            self.sites: tuple[Site, ...] = self.structure.into.in_order()
            self.absent: tuple[Absent, ...] = tuple(find_absent(self.structure))
