"""Rows prepended to what the first block of a stack reads, where no token is embedded: in models of pictures.

Shapes: B batch, T positions, L rows, D features.
"""

from __future__ import annotations

from torch import fx

from peftgraph.errors import PeftGraphError
from peftgraph.ir.builder import Builder
from peftgraph.rewrite.match import Match
from peftgraph.rewrite.sequence.axes import format_sizes
from peftgraph.rewrite.sequence.axis_propagation import AxisPropagation
from peftgraph.rewrite.sequence.prepended_rows import PrependedRows
from peftgraph.rewrite.sequence.resized_values import refusal
from peftgraph.sites import embedding
from peftgraph.sites.ports import input_port, result_port


def is_first_block_without_embedding(m: Match) -> bool:
    """Tell whether a site is the first block of a stack that no embedding feeds."""
    if m.site.role != "block" or m.site.layer != 0:
        return False
    before = {m.input, *Builder.nodes_from_inputs(m.input)}
    return all(one.output not in before for one in m.related(embedding))


def insert_before_block(m: Match, op: Builder, rows_LD: fx.Node, after: int, cut: bool) -> dict[str, fx.Node]:
    """Return what a block reads with the rows, masks for it, and results without what the model gives for the rows, by
    port.

    Raises:
        PeftGraphError: the block reads no sequence, or the rows cannot be followed through the model.
    """
    x_BTD = m.value(input_port(m.port("input")))
    sizes = x_BTD.meta["val"].shape
    if len(sizes) != 3:
        raise PeftGraphError(
            f"{m.site.id} reads {format_sizes(*sizes)}, no (batch, positions, features), so that rows cannot be "
            "prepended to it."
        )
    plan = PrependedRows(m, op, int(rows_LD.meta["val"].shape[0]), after)
    extended = plan.insert(x_BTD, plan.for_batch(rows_LD, x_BTD))
    propagation = AxisPropagation(m, op, x_BTD, extended, plan.rows)
    ports: dict[str, fx.Node] = {}
    for leaf in m.graph.output_node().all_input_nodes if cut else []:  # they come before x is moved, which may be one
        axes = {1} if leaf is x_BTD else propagation.results.get(leaf, frozenset())
        if axes is None:
            raise refusal(m, leaf, 'is a result that has its positions and other axes on one; choose returns="all"')
        if axes:
            value = extended if leaf is x_BTD else leaf
            ports[result_port(m.edits.base_value(leaf.name))] = plan.cut_axes(value, sorted(axes))
    ports |= {input_port(m.edits.base_value(value.name)): new for value, new in propagation.moves.items()}
    return ports | {input_port(m.edits.base_value(x_BTD.name)): extended}
