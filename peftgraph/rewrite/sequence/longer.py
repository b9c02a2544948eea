"""The inputs with rows in front of the tokens, and what follows from them worked out once more.

Shapes: B batch, T tokens, L rows.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from peftgraph.errors import PeftGraphError
from peftgraph.ir.builder import Builder
from peftgraph.rewrite.match import INPUT, Match
from peftgraph.rewrite.sequence.token_inputs import TokenInputs, of_tokens, same_size
from peftgraph.sites.dataflow import ops

aten = torch.ops.aten
END = 2**63 - 1


class Longer:
    """TokenInputs with L rows in front of the tokens, or behind the first of them.

    Of the rows is said what is said of the first token, but that a mask hides none of them and positions count on.
    """

    def __init__(self, m: Match, op: Builder, inputs: TokenInputs, length: object, rows: int, after: int = 0) -> None:
        self.m, self.op, self.inputs, self.length, self.rows, self.after = m, op, inputs, length, rows, after
        self._given = {m.value(INPUT + name): name for name in (*inputs.along, *inputs.whole)}

    def input(self, name: str) -> fx.Node:
        """An input of the tokens, (B, T) -> (B, L + T).

        Raises:
            PeftGraphError: it has more axes.
        """
        x = of_tokens(self.m, name)
        first = slice_of(self.op, x, 1, 0, 1)
        mask = self.inputs.mask
        if mask is not None and name == mask.name:
            first = self.op.call(aten.full_like.default, first, 0 if mask.hides else 1)
        longer = self.with_rows(x, self.op.call(aten.expand.default, first, [-1, self.rows]))
        return self.op.call(aten.add.Tensor, longer, self._shift(longer)) if name in self.inputs.positions else longer

    def labels(self, name: str, ignored: int) -> fx.Node:
        """Labels, (B, T) -> (B, L + T), with what the loss ignores for the rows."""
        x = self.m.value(INPUT + name)
        blank = self.op.call(aten.full_like.default, slice_of(self.op, x, 1, 0, 1), ignored)
        return self.with_rows(x, self.op.call(aten.expand.default, blank, [-1, self.rows]))

    def with_rows(self, x: fx.Node, rows: fx.Node) -> fx.Node:
        """The rows in front of x on its second axis, or behind the first ones."""
        ends = [slice_of(self.op, x, 1, 0, self.after)] if self.after else []
        behind = slice_of(self.op, x, 1, self.after) if self.after else x
        return self.op.call(aten.cat.default, [*ends, rows, behind], 1)

    def again(self, node: fx.Node) -> fx.Node:
        """The value of `node` with the longer inputs; `node` itself where it does not depend on them.

        Raises:
            PeftGraphError: it depends on them by way of the model's layers.
        """
        return self.op.shared_value(f"{node.name} for {self.rows} more", lambda: self._again(node))

    def _again(self, node: fx.Node) -> fx.Node:
        if node in self._given:
            return self.input(self._given[node])
        if node.op != "call_function":
            return node
        if ops.name(node) in ops.CONTRACTION:
            raise PeftGraphError(
                f"{self.m.site.id}: what is needed for {self.rows} more rows depends on %{node.name}, a product of the "
                "model's own, and not on the inputs and their sizes alone."
            )
        if node.target is aten.sym_size.int and same_size(node.meta["val"], self.length):
            return self.op.call(operator.add, node, self.rows)
        operands = [one for one in node.all_input_nodes if node.target is not aten.sym_size.int or one in self._given]
        copies = {operand: self.again(operand) for operand in operands}
        return node if all(old is new for old, new in copies.items()) else self.op.copy_call(node, copies)

    def _shift(self, longer: fx.Node) -> fx.Node:
        """How many rows stand before each place, (1, L + T)."""
        length = self.op.call(aten.sym_size.int, longer, 1)
        places = self.op.call(aten.arange.default, length, device=longer.meta["val"].device)
        before = self.op.call(aten.sub.Scalar, places, self.after) if self.after else places
        return self.op.call(aten.unsqueeze.default, self.op.call(aten.clamp.default, before, 0, self.rows), 0)


def slice_of(op: Builder, x: fx.Node, axis: int, start: int, stop: int = END) -> fx.Node:
    """x from `start` to `stop` on an axis."""
    return op.call(aten.slice.Tensor, x, axis, start, stop)
