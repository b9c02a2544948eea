"""Rows in front of embedded tokens that have their positions, types and norm already.

The embeddings stay as they are. What reads them reads a longer sequence, and what else follows from the inputs, such as
the mask, is worked out once more from longer inputs for all that stands behind the embeddings.
"""

from __future__ import annotations

import torch
from torch import fx

from peftgraph.errors import PeftGraphError
from peftgraph.ir.builder import Builder
from peftgraph.rewrite.growth import END, checked_inputs, earlier_keys
from peftgraph.rewrite.inputs import Inputs, reached, same_size
from peftgraph.rewrite.match import INPUT, RESULT, Match
from peftgraph.sites import block

aten = torch.ops.aten


class Behind:
    """L rows in front of what the first block reads of the tokens that a table lookup embeds.

    Shapes: B batch, T tokens, L rows, D features.
    """

    def __init__(self, m: Match, op: Builder, rows: int, after: int) -> None:
        self.m, self.op, self.rows, self.after = m, op, rows, after
        self.embedded = _finished(m)

    def inserted(self, rows_LD: fx.Node) -> dict[str, fx.Node]:
        """The embeddings with the rows, and all else that follows from the inputs and is read behind them, by port.

        Raises:
            PeftGraphError: the model has no first block, continues earlier calls, fixes the length, has inputs that
                rows do not fit in, or reads unfinished embeddings elsewhere.
        """
        inputs, before = self._checked(), self.op.above(self.embedded)
        self.op.held |= before | {self.embedded}
        grown = {self.m.value(INPUT + name): self._longer(inputs, name) for name in inputs.along}
        grown |= {self.m.value(INPUT + name): self._ignored(name, ignored) for name, ignored in inputs.labels}
        ports = {self._port(given): node for given, node in grown.items()}
        outside = [node for node in before if node.op != "placeholder" and self._read_outside(node, before)]
        ports |= {self._port(node): self._again(node, grown, before) for node in outside}
        return ports | {self._port(self.embedded): self._joined(rows_LD, self.embedded)}

    def _read_outside(self, node: fx.Node, before: set[fx.Node]) -> bool:
        return not (before | {self.embedded}).issuperset(node.users)

    def _again(self, node: fx.Node, grown: dict[fx.Node, fx.Node], before: set[fx.Node]) -> fx.Node:
        """`node`, which lies before the embeddings, of the longer inputs."""
        if node not in grown:
            for operand in node.all_input_nodes:
                if operand in before:
                    self._again(operand, grown, before)
            grown[node] = node if node.op == "placeholder" else self.op.copy(node, grown)
        return grown[node]

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
                ends = [self._slice(value, axis, 0, self.after), self._slice(value, axis, self.after + self.rows)]
                value = self.op.call(aten.cat.default, ends, axis) if self.after else ends[1]
            if axes:
                shorter[RESULT + name] = value
        return shorter

    def _checked(self) -> Inputs:
        inputs, site = checked_inputs(self.m), self.m.site.id
        if earlier_keys(self.m) is not None:
            raise PeftGraphError(
                f"Rows behind the embeddings of {site} need a model without calls before this one. Trace it without a "
                "cache."
            )
        follow = reached([self.m.output]).keys()
        unfinished = self.op.above(self.embedded) & follow
        elsewhere = follow - unfinished - {self.embedded}
        read = next((node for node in unfinished if not elsewhere.isdisjoint(node.users)), None)
        if read is not None:
            raise PeftGraphError(
                f"What {site} embeds is read before it is finished, as {read.name}, where no rows are. Put them among "
                'the tokens: onto="tokens".'
            )
        return inputs

    def _longer(self, inputs: Inputs, name: str) -> fx.Node:
        """An input (B, T) with the entry of its first token for every row; a mask hides no row, and positions that are
        read behind the embeddings count on."""
        x = self.m.value(INPUT + name)
        first = self._slice(x, 1, 0, 1)
        if inputs.mask is not None and name == inputs.mask.name:
            first = self.op.call(aten.full_like.default, first, 0 if inputs.mask.hides else 1)
        longer = self._with(x, self.op.call(aten.expand.default, first, [-1, self.rows]))
        return self.op.call(aten.add.Tensor, longer, self._shift(longer)) if name in inputs.positions else longer

    def _shift(self, longer: fx.Node) -> fx.Node:
        """How many rows stand before each place, (1, L + T)."""
        length = self.op.call(aten.sym_size.int, longer, 1)
        places = self.op.call(aten.arange.default, length, device=longer.meta["val"].device)
        before = self.op.call(aten.sub.Scalar, places, self.after) if self.after else places
        return self.op.call(aten.unsqueeze.default, self.op.call(aten.clamp.default, before, 0, self.rows), 0)

    def _ignored(self, name: str, value: int) -> fx.Node:
        x = self.m.value(INPUT + name)
        blank = self.op.call(aten.full_like.default, self._slice(x, 1, 0, 1), value)
        return self._with(x, self.op.call(aten.expand.default, blank, [-1, self.rows]))

    def _joined(self, rows_LD: fx.Node, x_BTD: fx.Node) -> fx.Node:
        batch = self.op.call(aten.sym_size.int, x_BTD, 0)
        rows_1LD = self.op.call(aten.unsqueeze.default, rows_LD, 0)
        return self._with(x_BTD, self.op.call(aten.expand.default, rows_1LD, [batch, -1, -1]))

    def _with(self, x: fx.Node, rows: fx.Node) -> fx.Node:
        """The rows in front of x on its second axis, behind what stands before them."""
        ends = [self._slice(x, 1, 0, self.after)] if self.after else []
        return self.op.call(aten.cat.default, [*ends, rows, self._slice(x, 1, self.after) if ends else x], 1)

    def _slice(self, x: fx.Node, axis: int, start: int, stop: int = END) -> fx.Node:
        return self.op.call(aten.slice.Tensor, x, axis, start, stop)

    def _port(self, node: fx.Node) -> str:
        return INPUT + self.m.edits.below(node.name)


def _finished(m: Match) -> fx.Node:
    """What the first block reads of the embedded tokens, before it is taken to another width.

    Raises:
        PeftGraphError: no block reads them.
    """
    inputs = [one.input for one in m.related(block)]
    reading = [x for x in inputs if m.output in Builder.above(x) | {x}]
    if not reading:
        raise PeftGraphError(f"No block reads what {m.site.id} embeds; choose the embedding of the tokens with at=.")
    value = min(reading, key=lambda x: x.meta["order"])
    width, way = m.output.meta["val"].shape[-1], {m.output, *Builder.between(m.output, value)}
    while value.meta["val"].shape[-1] != width:
        value = next(one for one in value.all_input_nodes if one in way)
    return value
