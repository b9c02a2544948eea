"""Rows in front of what the first block of a stack reads, where no token is embedded: those of pictures and sounds.

Shapes: B batch, T places, L rows, D features.
"""

from __future__ import annotations

import torch
from torch import fx

from peftgraph.errors import PeftGraphError
from peftgraph.ir.builder import Builder
from peftgraph.rewrite.match import INPUT, RESULT, Match
from peftgraph.rewrite.sequence.axis_propagation import Following
from peftgraph.rewrite.sequence.longer import slice_of
from peftgraph.rewrite.sequence.places import refusal
from peftgraph.rewrite.sequence.shapes import told
from peftgraph.sites import embedding

aten = torch.ops.aten


def is_first_block_without_embedding(m: Match) -> bool:
    """Whether a site is the first block of a stack that no embedding feeds."""
    if m.site.role != "block" or m.site.layer != 0:
        return False
    before = {m.input, *Builder.nodes_from_inputs(m.input)}
    return all(one.output not in before for one in m.related(embedding))


class InFront:
    """L rows in front of what a block reads, or behind the first of it, in everything that follows."""

    def __init__(self, m: Match, op: Builder, rows: int, after: int) -> None:
        self.m, self.op, self.rows, self.after = m, op, rows, after
        self.read = m.value(INPUT + m.port("input"))

    def inserted(self, rows_LD: fx.Node, cut: bool) -> dict[str, fx.Node]:
        """The longer sequence, masks for it, and results without what the model gives for the rows, by port.

        Raises:
            PeftGraphError: the block reads no sequence, or the rows cannot be followed through the model.
        """
        sizes = self.read.meta["val"].shape
        if len(sizes) != 3:
            raise PeftGraphError(
                f"{self.m.site.id} reads {told(*sizes)}, no (batch, places, features) that rows could be "
                "put in front of."
            )
        longer = self._with_rows(rows_LD)
        following = Following(self.m, self.op, self.read, longer, self.rows)
        ports = self._cut(following, longer) if cut else {}
        ports |= {self._port(value): new for value, new in following.moves.items()}
        return ports | {self._port(self.read): longer}

    def _with_rows(self, rows_LD: fx.Node) -> fx.Node:
        op, x_BTD = self.op, self.read
        batch = op.call(aten.sym_size.int, x_BTD, 0)
        rows_BLD = op.call(aten.expand.default, op.call(aten.unsqueeze.default, rows_LD, 0), [batch, -1, -1])
        ends = [slice_of(op, x_BTD, 1, 0, self.after)] if self.after else []
        behind = slice_of(op, x_BTD, 1, self.after) if self.after else x_BTD
        return op.call(aten.cat.default, [*ends, rows_BLD, behind], 1)

    def _cut(self, following: Following, longer: fx.Node) -> dict[str, fx.Node]:
        """The results without the rows; they come before what is read is moved, which may be a result itself."""
        shorter: dict[str, fx.Node] = {}
        for leaf in self.m.graph.output_node().all_input_nodes:
            value = longer if leaf is self.read else leaf
            axes = {1} if leaf is self.read else following.results.get(leaf, frozenset())
            if axes is None:
                words = 'is a result that has its places and other axes on one; choose returns="all"'
                raise refusal(self.m, leaf, words)
            for axis in sorted(axes):
                behind = slice_of(self.op, value, axis, self.after + self.rows)
                ends = [slice_of(self.op, value, axis, 0, self.after), behind]
                value = self.op.call(aten.cat.default, ends, axis) if self.after else behind
            if axes:
                shorter[RESULT + self.m.edits.base_value(leaf.name)] = value
        return shorter

    def _port(self, node: fx.Node) -> str:
        return INPUT + self.m.edits.base_value(node.name)
