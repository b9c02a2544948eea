"""What a search for a pattern gives: matches, or the attempt that came furthest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import fx


@dataclass(frozen=True)
class Match:
    """Names bound to nodes, as far as a search has come.

    `places`: the values through which each name was read; `tags`: the alternatives taken; `count`: how many operators
    have matched; `inside`: the equation that is being read.
    """

    nodes: Mapping[str, fx.Node] = field(default_factory=dict)
    places: Mapping[str, tuple[fx.Node, ...]] = field(default_factory=dict)
    operators: Mapping[str, str] = field(default_factory=dict)
    tags: tuple[str, ...] = ()
    count: int = 0
    inside: str = ""

    def bound(self, name: str, node: fx.Node) -> Match:
        return replace(self, nodes={**self.nodes, name: node})

    def read(self, name: str, place: fx.Node) -> Match:
        known = self.places.get(name, ())
        return self if place in known else replace(self, places={**self.places, name: (*known, place)})


@dataclass(frozen=True)
class Miss:
    """The furthest that a pattern came: how many of its operators matched, and what stood where another should.

    `inside` is the equation that failed; `node` the value that stood there, None where it was a literal or nothing.
    """

    matched: int
    total: int
    inside: str
    expected: str
    found: str
    node: fx.Node | None
