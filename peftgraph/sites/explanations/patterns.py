"""Why a pattern matches nowhere: how far the nearest attempt came, and where it failed."""

from __future__ import annotations

from peftgraph.sites.finders.patterns import PatternSearch
from peftgraph.sites.found import FoundSites
from peftgraph.sites.patterns.pattern import PatternRole


def explain_pattern(sites: FoundSites, chosen: PatternRole) -> str:
    """Return the reason for no site, with the line of the graph at which the nearest match failed."""
    return describe(sites.search_of(chosen.pattern), chosen)


def describe(one: PatternSearch, chosen: PatternRole) -> str:
    """Return the near-miss of one search: how far it came, and what it found there instead."""
    if one.count:
        return f"the pattern matches {one.count} times, but never by an alternative with {chosen.part}"
    lines = ["the pattern matches nowhere"]
    miss = one.miss
    if miss is not None:
        where = f" at {one.path}" if one.path else ""
        lines.append(f"    closest: {one.pattern.name}{where}, {miss.matched} of {miss.total} operators")
        arrow = f"    <- {one.shown}" if one.shown else ""
        lines.append(f"    {miss.inside} : expected {miss.expected}, found {miss.found}{arrow}")
    return "\n".join(lines)
