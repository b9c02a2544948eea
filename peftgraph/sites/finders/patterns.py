"""Sites of patterns: the values of their matches, each with its columns and its weight."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from peftgraph.sites.assign.attention import ProjectionPart
from peftgraph.sites.assign.evidence import Step, step
from peftgraph.sites.assign.naming import module_of
from peftgraph.sites.assign.structure import Structure
from peftgraph.sites.dataflow.tags import in_order
from peftgraph.sites.matchers.anatomy import Anatomy
from peftgraph.sites.matchers.arrivals import arrivals, columns_of, split
from peftgraph.sites.matchers.projections import Projection
from peftgraph.sites.patterns.arguments import excerpt
from peftgraph.sites.patterns.match import Matcher, Wholes
from peftgraph.sites.patterns.outcome import Match, Miss
from peftgraph.sites.patterns.pattern import Pattern
from peftgraph.sites.patterns.terms import Window
from peftgraph.sites.site import Columns, NearMiss, Site


@dataclass(frozen=True, eq=False)
class Found:
    """One value of one match. `part` is None where the value is no projection; `values` are all of the match."""

    role: str
    node: fx.Node
    part: ProjectionPart | None
    tags: tuple[str, ...]
    values: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class PatternSearch:
    """What became of a pattern on a graph.

    Attributes:
        pattern: what was looked for.
        count: how many matches there are.
        miss: the attempt that came furthest, where there is no match.
        shown: the node that stood in the way, as a line of the graph; "" where there is none.
        path: the module that node came from, for display.
    """

    pattern: Pattern
    count: int
    miss: Miss | None = None
    shown: str = ""
    path: str = ""


def find(structure: Structure, pattern: Pattern) -> PatternSearch:
    """Add the sites of a pattern, and return what became of the search for it."""
    found, report = search(structure.anatomy, pattern)
    for one in found:
        place = structure.into.place(one.node)
        if one.part is not None:
            structure.into.part(one.part, place, tags=one.tags, values=one.values)
        else:
            structure.into.value(one.role, one.node, place, tags=one.tags, values=one.values)
    return report


def evidence(structure: Structure, site: Site, node: fx.Node) -> list[Step]:
    """Say in which match of which pattern a value stands."""
    pattern, _, part = site.role.rpartition(".")
    others = [(name, value) for name, value in site.values if name != part]
    shown = f", where {', '.join(f'{name} is %{value}' for name, value in others)}" if others else ""
    nodes = [one for one in structure.flow.nodes if one.name in dict(others).values()]
    return [step(f"%{node.name} is `{part}` in a match of the pattern {pattern}{shown}", nodes, node)]


def near_misses(structure: Structure, role: str) -> Iterator[NearMiss]:
    """Find nothing: the search for a pattern keeps its own nearest attempt (`PatternSearch.miss`)."""
    return iter(())


def search(anatomy: Anatomy, pattern: Pattern) -> tuple[list[Found], PatternSearch]:
    """Return the values of all matches, each value of a role once; and what to say where there are none."""
    widths = {node: one.width for node, one in anatomy.projection_at.items()}
    matcher = Matcher(pattern, anatomy.flow, wholes(anatomy), widths)
    matches = matcher.matches()
    found: dict[tuple[str, fx.Node, Columns | None], Found] = {}
    for match in matches:
        for one in _values(anatomy, pattern, match):
            found.setdefault((one.role, one.node, one.part and one.part.columns), one)
    miss = None if matches else matcher.nearest()
    if miss is None or miss.node is None:
        return list(found.values()), PatternSearch(pattern, len(matches), miss)
    return list(found.values()), PatternSearch(pattern, len(matches), miss, excerpt(miss.node), module_of(miss.node))


def wholes(anatomy: Anatomy) -> Wholes:
    """Return the values that the anatomy recognises in every spelling, by the word for them."""
    return {
        "projection": {node: (one.input,) for node, one in anatomy.projection_at.items()},
        "norm": {node: (one.input,) for node, one in anatomy.norm_at.items()},
        "attention": {node: (one.q, one.k, one.v) for node, one in anatomy.core_at.items()},
    }


def _values(anatomy: Anatomy, pattern: Pattern, match: Match) -> Iterator[Found]:
    terms = dict(pattern.equations)
    values = tuple((name, node.name) for name, node in sorted(match.nodes.items(), key=lambda item: item[0]))
    for name in pattern.parts:
        if name not in match.nodes:  # it stands in an alternative that was not taken
            continue
        node, role = match.nodes[name], f"{pattern.name}.{name}"
        one = anatomy.projection_at.get(node)
        if one is None:
            yield Found(role, node, None, match.tags, values)
            continue
        term = terms[name]
        columns = _cut(one, term) if isinstance(term, Window) else _arriving(anatomy, one, match.places[name])
        yield Found(role, one.node, ProjectionPart(role, one, columns), match.tags, values)


def _cut(one: Projection, window: Window) -> Columns | None:
    stop = one.width if window.stop is None else window.stop
    return columns_of(one, torch.arange(window.start, stop))


def _arriving(anatomy: Anatomy, one: Projection, places: tuple[fx.Node, ...]) -> Columns | None:
    """Return the columns that reach the places where the pattern reads the projection."""
    if any(place in (one.node, one.output) for place in places):
        return None
    arrived = [split(in_order(tags), [one], bases)[0] for tags, bases in (arrivals(anatomy, p, [one]) for p in places)]
    features = in_order(torch.cat(arrived) + 1) - 1
    return columns_of(one, features) if len(features) else None
