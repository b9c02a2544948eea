"""How the blocks of a model follow one another: what each stack begins with, and where the model goes on without it.

Everything is read off the base: an operand that another pass put in stands for the value that it replaced.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import fx

from peftgraph.rewrite.match import Match
from peftgraph.sites import parse_selector
from peftgraph.sites.dataflow import ops

# What may lie between the last block and the norm that follows it.
PASSED = ops.DROPOUT | ops.CAST | ops.words("view reshape _unsafe_view contiguous clone alias")


def operands_of(m: Match, node: fx.Node) -> dict[fx.Node, fx.Node]:
    """Return the operands of a call of the base, each with the value of the base that it stands for."""
    return {one: m.names[m.edits.base_value(one.name)] for one in node.all_input_nodes}


def base_nodes(m: Match) -> Iterator[fx.Node]:
    """Yield the nodes of the base but its output, in order."""
    return (node for node in m.graph.nodes if "origin" not in node.meta and node.op != "output")


@dataclass
class Stacks:
    """The blocks of a model.

    Attributes:
        m: any match in it.
        blocks: in order.
    """

    m: Match
    blocks: list[Match] = field(init=False)
    _behind: dict[fx.Node, int] = field(init=False)

    def __post_init__(self) -> None:
        names = self.m.names
        place = {node: i for i, node in enumerate(base_nodes(self.m))}
        found = self.m.related(parse_selector("block"))
        self.blocks = sorted(found, key=lambda one: place[names[one.site.ports["output"]]])
        bits = {names[one.site.ports["output"]]: 1 << i for i, one in enumerate(self.blocks)}
        self._behind = {}  # which blocks a value depends on, as bits
        for node in place:
            bit = bits.get(node, 0)
            for one in operands_of(self.m, node).values():
                bit |= self._behind[one]
            self._behind[node] = bit

    def before(self, value: fx.Node) -> list[Match]:
        """Return the blocks that a value depends on, that which gives it among them."""
        return [one for i, one in enumerate(self.blocks) if self._behind[value] >> i & 1]

    def inputs(self) -> dict[fx.Node, Match]:
        """Return the values that blocks read and no block gives, such as embedded tokens, each with its first block."""
        found: dict[fx.Node, Match] = {}
        for one in self.blocks:
            value = self.m.names[one.site.ports["input"]]
            if not self._behind[value]:
                found.setdefault(value, one)
        return found

    def ends(self) -> set[str]:
        """Return the sites behind which the model goes on without blocks, by their ids: the norm that alone reads what
        a last block gives, or that block, where no norm does."""
        outputs = [self.m.names[one.site.ports["output"]] for one in self.blocks]
        found = set[str]()
        for i, one in enumerate(self.blocks):
            if not any(self._behind[value] >> i & 1 for j, value in enumerate(outputs) if j != i):
                found.add(self._norm_after(outputs[i]) or one.site.id)
        return found

    def _norm_after(self, end: fx.Node) -> str | None:
        for one in self.m.related(parse_selector("norm")):
            source = self.m.names[one.site.ports["input"]]
            while source is not end and ops.name(source) in PASSED:
                source = next(iter(operands_of(self.m, source).values()))
            if source is end and self.m.names[one.site.ports["output"]] is not end:
                return one.site.id
        return None
