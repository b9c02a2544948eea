"""What a search for sites gives: the sites, and what was recorded on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self, overload

from peftgraph.errors import PeftGraphError
from peftgraph.sites.finders.patterns import PatternSearch
from peftgraph.sites.origin import Origin
from peftgraph.sites.patterns.pattern import Pattern, patterns_of
from peftgraph.sites.selectors.selector import as_selector
from peftgraph.sites.site import Absent, NearMiss, Site


@dataclass(frozen=True)
class FoundSites(Sequence[Site]):
    """Hold the sites of one graph, in graph order, with what the searches for them recorded. Immutable.

    Attributes:
        items: the sites.
        misses: how far searches came that found nothing.
        searched: what became of each pattern that was looked for.
        origin: the graph; None where it is not at hand.
        absent: the sites that attentions lack that others have.
    """

    items: tuple[Site, ...]
    misses: tuple[NearMiss, ...] = ()
    searched: tuple[PatternSearch, ...] = ()
    origin: Origin | None = field(default=None, compare=False, repr=False)
    absent: tuple[Absent, ...] = ()

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        return self  # a value: copies of what holds it share it

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "origin": None}  # serialised without the graph; it is compared without it too

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, index: int) -> Site: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Site, ...]: ...
    def __getitem__(self, index: int | slice) -> Site | tuple[Site, ...]:
        return self.items[index]

    @property
    def layers(self) -> int:
        """The number of layers (of the deepest stack)."""
        return 1 + max((site.layer for site in self.items if site.layer is not None), default=-1)

    def select(self, selector: object) -> tuple[Site, ...]:
        """Return the sites a selector (or its text) matches; possibly none."""
        chosen = as_selector(selector)
        for pattern in patterns_of(chosen):
            self.search_of(pattern)
        return tuple(site for site in self.items if chosen.matches(site))

    def lacking(self, selector: object) -> tuple[Absent, ...]:
        """Return the sites that a selector would match if the graph had them: attentions that a pass on attentions
        leaves out."""
        chosen = as_selector(selector)
        return tuple(one for one in self.absent if chosen.matches(one.site))

    def search_of(self, pattern: Pattern) -> PatternSearch:
        """Return what became of a pattern on this graph.

        Raises:
            PeftGraphError: it was not searched for.
        """
        found = next((one for one in self.searched if one.pattern == pattern), None)
        if found is None:
            raise PeftGraphError(
                f"these sites were not searched for the pattern {pattern.name}. program.apply(...) does so by itself; "
                "program.with_patterns(...).sites are the sites to look at."
            )
        return found
