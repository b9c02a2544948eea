"""The sites of a program: a sequence with selection, explanations and a printed table."""

from __future__ import annotations

from peftgraph.sites.explanations.explain import explain, require
from peftgraph.sites.explanations.explanation import Explanation
from peftgraph.sites.explanations.listing import as_html, as_text
from peftgraph.sites.explanations.unmatched import Unmatched, unmatched
from peftgraph.sites.found import FoundSites
from peftgraph.sites.selectors.filters import narrowed
from peftgraph.sites.site import Site


class Sites(FoundSites):
    """The sites of one graph, in graph order. Immutable.

    `sites.select("attention.q")` returns sites; `print(sites.explain("attention.q", layer=0))` says why they are sites.
    """

    def require(self, selector: object) -> tuple[Site, ...]:
        """Like select, but no match is an error that says why, and an alternative that never matched a warning."""
        return require(self, selector)

    def explain(
        self,
        selector: object,
        *,
        layer: int | None = None,
        stack: str | None = None,
        kind: str | None = None,
        expert: int | None = None,
        path: str | None = None,
    ) -> Explanation:
        """Why these are sites, node by node; or, where nothing matches, the nearest miss.

        Args:
            selector: a selector or its text.
            layer: narrow to one layer, -1 for the last.
            stack: narrow to one stack, such as "decoder".
            kind: narrow to "self" or "cross" attention.
            expert: narrow to one expert.
            path: narrow to the paths that match a regular expression as a whole.

        Returns:
            What was found and why; it prints as text with an excerpt of the graph.
        """
        return explain(self, narrowed(selector, layer, stack, kind, expert, path))

    @property
    def unmatched(self) -> Unmatched:
        """The projections that belong to no site, each with the closest role and where it failed; prints as a table."""
        return unmatched(self)

    def _repr_html_(self) -> str:
        return as_html(self.items)

    def __str__(self) -> str:
        return as_text(self.items)
