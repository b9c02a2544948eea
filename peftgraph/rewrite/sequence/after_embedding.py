"""Rows in front of embedded tokens that have their positions, types and norm already.

The embeddings stay as they are. What reads them reads a longer sequence, and what else follows from the inputs, such as
the mask, is worked out once more from longer inputs for all that stands behind the embeddings.
"""

from __future__ import annotations

import torch
from torch import fx

from peftgraph.errors import PeftGraphError
from peftgraph.ir.builder import Builder
from peftgraph.rewrite.match import INPUT, RESULT, Match
from peftgraph.rewrite.sequence.growth import checked_inputs, earlier_keys
from peftgraph.rewrite.sequence.longer import Longer, slice_of
from peftgraph.rewrite.sequence.token_inputs import TokenInputs, reached, same_size
from peftgraph.sites import block

aten = torch.ops.aten


class Behind:
    """L rows in front of what the first block reads of the tokens that a table lookup embeds.

    Shapes: B batch, T tokens, L rows, D features.
    """

    def __init__(self, m: Match, op: Builder, rows: int, after: int) -> None:
        self.m, self.op, self.rows, self.after = m, op, rows, after
        self.embedded = _embedding_output(m)

    def inserted(self, rows_LD: fx.Node) -> dict[str, fx.Node]:
        """The embeddings with the rows, and all else that follows from the inputs and is read behind them, by port.

        Raises:
            PeftGraphError: the model has no first block, continues earlier calls, fixes the length, has inputs that
                rows do not fit in, or reads unfinished embeddings elsewhere.
        """
        inputs, before = self._checked(), self.op.nodes_from_inputs(self.embedded)
        self.op.pinned_users |= before | {self.embedded}
        longer = Longer(self.m, self.op, inputs, self.embedded.meta["val"].shape[1], self.rows, self.after)
        ports = {INPUT + name: longer.again(self.m.value(INPUT + name)) for name in inputs.along}
        ports |= {INPUT + name: longer.labels(name, ignored) for name, ignored in inputs.labels}
        inner = before | {self.embedded}
        outside = [node for node in before if node.op != "placeholder" and not inner.issuperset(node.users)]
        again = {self._port(node): longer.again(node) for node in outside if longer.again(node) is not node}
        return ports | again | {self._port(self.embedded): longer.with_rows(self.embedded, self._of_batch(rows_LD))}

    def results(self) -> dict[str, fx.Node]:
        """What the model returns for each token, without what it gives for the rows, by port."""
        port = self._port(self.embedded)
        length = self.m.value(port).meta["val"].shape[1]
        shorter: dict[str, fx.Node] = {}
        for leaf in self.m.graph.output_node().all_input_nodes:
            name = self._port(leaf).removeprefix(INPUT)
            value = self.m.value(RESULT + name)
            sizes = value.meta["val"].shape if isinstance(value.meta["val"], torch.Tensor) else ()
            axes = [axis for axis, size in enumerate(sizes) if same_size(size, length)]
            for axis in axes:
                behind = slice_of(self.op, value, axis, self.after + self.rows)
                ends = [slice_of(self.op, value, axis, 0, self.after), behind]
                value = self.op.call(aten.cat.default, ends, axis) if self.after else ends[1]
            if axes:
                shorter[RESULT + name] = value
        return shorter

    def _checked(self) -> TokenInputs:
        inputs, site = checked_inputs(self.m), self.m.site.id
        if earlier_keys(self.m) is not None:
            raise PeftGraphError(
                f"Rows behind the embeddings of {site} need a model without calls before this one. Trace it without a "
                "cache."
            )
        follow = reached([self.m.output]).keys()
        unfinished = self.op.nodes_from_inputs(self.embedded) & follow
        elsewhere = follow - unfinished - {self.embedded}
        read = next((node for node in unfinished if not elsewhere.isdisjoint(node.users)), None)
        if read is not None:
            raise PeftGraphError(
                f"What {site} embeds is read before it is finished, as {read.name}, where no rows are. Put them among "
                'the tokens: onto="tokens".'
            )
        return inputs

    def _of_batch(self, rows_LD: fx.Node) -> fx.Node:
        batch = self.op.call(aten.sym_size.int, self.embedded, 0)
        rows_1LD = self.op.call(aten.unsqueeze.default, rows_LD, 0)
        return self.op.call(aten.expand.default, rows_1LD, [batch, -1, -1])

    def _port(self, node: fx.Node) -> str:
        return INPUT + self.m.edits.base_value(node.name)


def embedding_output_port(m: Match) -> str:
    """The port of the finished embeddings: of what the first block reads of the embedded tokens, in their own width.

    Args:
        m: the embedding of the tokens.

    Raises:
        PeftGraphError: no block reads them.
    """
    return INPUT + m.edits.base_value(_embedding_output(m).name)


def _embedding_output(m: Match) -> fx.Node:
    """What the first block reads of the embedded tokens, before it is taken to another width.

    Raises:
        PeftGraphError: no block reads them.
    """
    inputs = [one.input for one in m.related(block)]
    reading = [x for x in inputs if m.output in Builder.nodes_from_inputs(x) | {x}]
    if not reading:
        raise PeftGraphError(f"No block reads what {m.site.id} embeds; choose the embedding of the tokens with at=.")
    value = min(reading, key=lambda x: x.meta["order"])
    width, way = m.output.meta["val"].shape[-1], {m.output, *Builder.nodes_between(m.output, value)}
    while value.meta["val"].shape[-1] != width:
        value = next(one for one in value.all_input_nodes if one in way)
    return value
