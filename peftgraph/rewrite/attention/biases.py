"""What falls of an attention's masks and biases on rows before its keys, and what on the tokens' keys beside them.

A mask says what a query may see, by whatever the inputs are; a bias of the distance is looked up in parameters of the
model, b(j - i) for key j and query i. The two meet where one is added to the other, or fills what the other leaves.
Shapes: T tokens, L rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import fx

from peftgraph.errors import PeftGraphError
from peftgraph.ir.builder import Builder
from peftgraph.rewrite.attention.layout import axes_of
from peftgraph.rewrite.match import Match
from peftgraph.rewrite.sequence.axes import same_size, slice_of
from peftgraph.rewrite.sequence.prepended_rows import PrependedRows
from peftgraph.rewrite.sequence.token_inputs import find_token_inputs
from peftgraph.sites.dataflow import ops

aten = torch.ops.aten

Biases = Literal["kept", "shifted", "dropped"]
MASKS = {
    aten.add.Tensor,
    aten.add_.Tensor,
    aten.sub.Tensor,
    aten.masked_fill.Scalar,
    aten.masked_fill_.Scalar,
    aten.masked_fill.Tensor,
    aten.masked_fill_.Tensor,
    aten.where.self,
    aten.where.ScalarOther,
    aten.where.ScalarSelf,
}
LOOKUPS = ops.words("embedding index gather index_select take_along_dim")
SAME = ops.CAST | {"contiguous", "clone"}


class Shares:
    """Tokens keep what they have; nothing hides the rows, and no bias falls on them."""

    def front(self, mask: fx.Node) -> fx.Node | None:
        """Return the part of a mask or bias for the rows, (..., T, L); None if it has none."""
        return None

    def own(self, mask: fx.Node) -> fx.Node:
        """Return its part for the tokens, (..., T, T)."""
        return mask


def shares_of(m: Match, op: Builder, rows: int, placed: bool, biases: Biases) -> Shares:
    """Return the parts of masks and biases for an attention's rows and tokens; cross-attention has no positions, so no
    distances.

    Raises:
        PeftGraphError: inputs cannot be made longer.
    """
    if m.site.kind != "self":
        return Shares()
    if placed:
        return _Placed(_prepended_rows(m, op, rows))
    match biases:
        case "kept":
            return Shares()
        case "shifted":
            return _Shifted(m, op, _prepended_rows(m, op, rows))
        case "dropped":
            return _Dropped(m, op)


def _prepended_rows(m: Match, op: Builder, rows: int) -> PrependedRows:
    queries, keys = (m.value(port).meta["val"].shape[axes_of(m, port).positions] for port in ("q", "v"))
    inputs = find_token_inputs(m, queries, None if same_size(queries, keys) else keys)
    return PrependedRows(m, op, rows, inputs=inputs, length=queries)


class _Placed(Shares):
    """The rows are so many tokens before all others: theirs are the first columns of longer masks and biases."""

    def __init__(self, plan: PrependedRows) -> None:
        self.plan = plan

    def front(self, mask: fx.Node) -> fx.Node | None:
        op, rows, again = self.plan.op, self.plan.rows, self.plan.recompute(mask)
        if again is mask:
            return None
        queried = again if same_size(again.meta["val"].shape[-2], 1) else slice_of(op, again, -2, rows)
        return slice_of(op, queried, -1, 0, rows)


class _Apart(Shares, ABC):
    """Masks stay as they are and hide no row; biases change."""

    def __init__(self, m: Match, op: Builder) -> None:
        self.m, self.op = m, op

    @abstractmethod
    def of_rows(self, bias: fx.Node) -> fx.Node | None:
        """Return the biases of the rows, in place of the model's own."""

    @abstractmethod
    def of_tokens(self, bias: fx.Node) -> fx.Node:
        """Return the biases of the tokens."""

    def front(self, mask: fx.Node) -> fx.Node | None:
        if not self._is_biased(mask):
            return None
        inner = self._inner(mask)
        if inner is None:
            return self.of_rows(mask)
        front = self.front(inner)
        return self.op.copy_call(mask, {inner: front}) if front is not None and ops.name(mask) in SAME else front

    def own(self, mask: fx.Node) -> fx.Node:
        if not self._is_biased(mask):
            return mask
        inner = self._inner(mask)
        return self.of_tokens(mask) if inner is None else self.op.copy_call(mask, {inner: self.own(inner)})

    def _is_biased(self, mask: fx.Node) -> bool:
        """Tell whether a value is looked up in the model's parameters."""
        seen, todo = {mask}, [mask]
        while todo:
            node = todo.pop()
            if node.op == "get_attr" and self.m.table[str(node.target)].kind == "parameter":
                return True
            if ops.name(node) in ops.CONTRACTION:
                raise PeftGraphError(
                    f"{self.m.site.id} adds what depends on %{node.name}, a product of the model's own, to its scores, "
                    'and no bias of the distance alone. Leave biases="kept".'
                )
            new = [] if node.target is aten.sym_size.int else [one for one in node.all_input_nodes if one not in seen]
            seen.update(new)
            todo += new
        return False

    def _inner(self, mask: fx.Node) -> fx.Node | None:
        """Return the bias where a mask and a bias are combined, or the value that this one is a copy of; None at a bias
        alone."""
        if ops.name(mask) in SAME:
            return mask.all_input_nodes[0]
        biased, others = self._operands(mask)
        if mask.target not in MASKS or not others:
            self._refuse_mixed(mask)
            return None
        if len(biased) > 1 or mask.target is aten.sub.Tensor or mask.kwargs.get("alpha", 1) != 1:
            raise self._mixed(mask)
        return biased[0]

    def _operands(self, node: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
        """Return the values that a value is computed from: the biases, and the other tensors."""
        tensors = [one for one in node.all_input_nodes if isinstance(one.meta["val"], torch.Tensor)]
        biased = [one for one in tensors if self._is_biased(one)]
        return biased, [one for one in tensors if one not in biased]

    def _refuse_mixed(self, bias: fx.Node) -> None:
        """Refuse a bias that depends on tensors other than its positions, which may include a mask."""
        todo = [bias]
        while todo:
            node = todo.pop()
            if node.op == "get_attr" or ops.name(node) in LOOKUPS:
                continue
            biased, others = self._operands(node)
            if others:
                raise self._mixed(node)
            todo += biased

    def _mixed(self, node: fx.Node) -> PeftGraphError:
        return PeftGraphError(
            f"{self.m.site.id} mixes its biases with a mask at %{node.name} ({node.target}), where they cannot be told "
            'apart. Leave biases="kept".'
        )


class _Shifted(_Apart):
    """Keys are counted from the first row on, and queries from the first token: b(L + j - i) on token j, b(p - i) on
    row p. Among so many tokens more, the first queries have these."""

    def __init__(self, m: Match, op: Builder, plan: PrependedRows) -> None:
        super().__init__(m, op)
        self.plan = plan

    def of_rows(self, bias: fx.Node) -> fx.Node | None:
        return slice_of(self.op, self._whole(bias), -1, 0, self.plan.rows)

    def of_tokens(self, bias: fx.Node) -> fx.Node:
        return slice_of(self.op, self._whole(bias), -1, self.plan.rows)

    def _whole(self, bias: fx.Node) -> fx.Node:
        """Return the whole mask or bias, (..., T, L + T)."""
        again = self.plan.recompute(bias)
        if again is bias:
            raise PeftGraphError(
                f"The biases of {self.m.site.id}, %{bias.name}, are the same for any number of tokens: there are none "
                f'for {self.plan.rows} more. Leave biases="kept".'
            )
        return slice_of(self.op, again, -2, 0, -self.plan.rows)


class _Dropped(_Apart):
    """There are no biases."""

    def of_rows(self, bias: fx.Node) -> fx.Node | None:
        return None

    def of_tokens(self, bias: fx.Node) -> fx.Node:
        return self.op.call(aten.zeros_like.default, bias)
