"""The nesting levels of edits of one value."""

from __future__ import annotations

from enum import IntEnum

from peftgraph.sites.roles import level_of


class Nesting(IntEnum):
    """Orders the edits of one value: an edit is applied inside those with a higher level, whatever the order of
    application.

    A projection's own output is part of its sublayer's, and that of its block's, though all three may be one node of
    the graph. A rule takes the level of its site's role unless it sets `Rule.nesting`.

    Attributes:
        INNERMOST: changes the site's own computation, inside the edits of all other passes.
        PROJECTION: the output of one operation.
        SUBLAYER: the output of an attention or a feed-forward.
        BLOCK: the output of a block.
        OUTERMOST: outside all other edits of the site's own computation.
    """

    INNERMOST = -1
    PROJECTION = 0
    SUBLAYER = 1
    BLOCK = 2
    OUTERMOST = BLOCK


def nesting_of(role: str) -> Nesting:
    """Return the nesting level of values at sites of a role."""
    return Nesting(level_of(role))
