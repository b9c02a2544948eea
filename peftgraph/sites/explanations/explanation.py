"""What an explanation says, and how it prints."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from peftgraph.sites.explanations.evidence import steps
from peftgraph.sites.explanations.near_misses import near_misses
from peftgraph.sites.origin import Origin
from peftgraph.sites.site import NearMiss, Site

MOST_LINES = 16  # lines of one excerpt around a near miss


@dataclass(frozen=True)
class Reasons:
    """Why one site is one.

    Attributes:
        site: the site.
        steps: the claims, from the operator outward to the layer; values in them have their printed names.
        excerpt: the lines of `program.text()` that these claims are about.
    """

    site: Site
    steps: tuple[str, ...]
    excerpt: tuple[str, ...]

    def __str__(self) -> str:
        shape = [] if self.site.shape is None else [" x ".join(map(str, self.site.shape))]
        columns = [] if self.site.columns is None else [f"columns {self.site.columns}"]
        facts = ", ".join([*shape, *columns])
        lines = [f"{self.site}{f' ({facts})' if facts else ''}"]
        lines += [f"  {number}. {claim}" for number, claim in enumerate(self.steps, start=1)]
        return "\n".join([*lines, "", *(f"    {line}" for line in self.excerpt)] if self.excerpt else lines)


@dataclass(frozen=True)
class Explanation:
    """The answer to `sites.explain(selector)`; it prints as text.

    Attributes:
        selector: the question.
        reasons: for each site that is explained, why it is one.
        others: the ids of further sites, which the same reasons hold for.
        problem: why there is no site, if there is none.
    """

    selector: str
    reasons: tuple[Reasons, ...] = ()
    others: tuple[str, ...] = ()
    problem: str = ""

    def __str__(self) -> str:
        parts = [self.problem] if self.problem else [str(one) for one in self.reasons]
        if self.others:
            shown = ", ".join(self.others[:8]) + (", ..." if len(self.others) > 8 else "")
            parts.append(f"and {len(self.others)} more: {shown}")
        return "\n\n".join(parts)

    __repr__ = __str__


def reasons_for(origin: Origin, site: Site) -> Reasons:
    """Return the evidence of one site, with printed names."""
    found = steps(origin.structure, site)
    names = [name for step in found for name in step.nodes]
    return Reasons(site, tuple(origin.say(step.claim) for step in found), tuple(origin.lines(names)))


def nearest(origin: Origin, role: str) -> list[str]:
    """Return the nearest miss of a role as indented lines, with the excerpt of the graph around it; none where nothing
    came near."""
    misses = near_misses(origin.structure, role)
    return [] if not misses else [*describe(origin, misses[0]), *_runners_up(origin, misses)]


def describe(origin: Origin, miss: NearMiss) -> list[str]:
    """Return how far a search got, at which node it failed and why."""
    head = origin.say(f"    closest: {miss.role} at %{miss.node}, {miss.passed} of {miss.total} conditions")
    return [head, origin.say(f"    expected {miss.expected}, found {miss.found}"), *excerpt(origin, miss)]


def excerpt(origin: Origin, miss: NearMiss) -> list[str]:
    """Return the lines around a near miss; `>` marks the node at which it failed."""
    order = list(origin.nodes)
    near = sorted({*miss.near} - {miss.node}, key=lambda name: abs(order.index(name) - order.index(miss.node)))
    kept: Iterable[str] = [miss.node, *near[: MOST_LINES - 1]]
    marked = set(origin.lines([miss.node]))
    return [f"      {'>' if line in marked else ' '} {line}" for line in origin.lines(kept)]


def _runners_up(origin: Origin, misses: list[NearMiss]) -> list[str]:
    nodes = [node for node in dict.fromkeys(miss.node for miss in misses) if node != misses[0].node]
    shown = ", ".join(f"%{node}" for node in nodes[:4]) + (", ..." if len(nodes) > 4 else "")
    return [origin.say(f"    {len(nodes)} more came as far or less far: {shown}")] if nodes else []
