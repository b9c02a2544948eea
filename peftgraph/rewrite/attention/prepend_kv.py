"""Attention over more rows: keys and values of a pass, prepended to the model's, in the attention itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import fx

from peftgraph.errors import Conflict
from peftgraph.ir.builder import Builder
from peftgraph.rewrite.attention.biases import Biases, Shares, shares_of
from peftgraph.rewrite.attention.eager_attention import Written, refusal
from peftgraph.rewrite.attention.layout import axes_of, each_by_head, laid_out, size_of_head
from peftgraph.rewrite.joins import Join
from peftgraph.rewrite.match import Match
from peftgraph.sites.dataflow import ops
from peftgraph.sites.dataflow.flow import hint

aten = torch.ops.aten

FUSED = aten.scaled_dot_product_attention.default
VIEWS_OF_MEMORY = {aten.view.default, aten._unsafe_view.default}
COPYING = {"contiguous", "clone", "reshape", "flatten", "cat", "stack", "repeat", "repeat_interleave"}


def key_head_shape(m: Match) -> tuple[int, int]:
    """(heads, features of one) of an attention's keys, before they are repeated for the queries that share them.

    Raises:
        PeftGraphError: the site is no attention core, or it is not known how its keys hold heads and features.
    """
    return _heads_of(m, "k")


def value_head_shape(m: Match) -> tuple[int, int]:
    """(heads, features of one) of an attention's values; like `key_head_shape`."""
    return _heads_of(m, "v")


def _heads_of(m: Match, port: str) -> tuple[int, int]:
    return axes_of(m, port).heads, size_of_head(m, port, m.value(port))


@dataclass(frozen=True)
class PrependKV(Join):
    """Keys and values prepended to an attention's own: the delta gives both, `{"keys": ..., "values": ...}`.

    Both are (1, G, L, D), or (B, G, L, D) for rows that differ by example; `key_head_shape` and `value_head_shape` give
    G and D.

    Attributes:
        port: the attention's output.
        exclusive: of two on one attention one would undo the other.
        shuts: rows of zeros still take part in the attention.
        placed: whether the rows have places, before all tokens; see `attend_with_rows`.
        biases: what becomes of the model's biases of the distance; see `attend_with_rows`.
    """

    port: str = "output"
    exclusive: bool = True
    shuts: bool = False
    placed: bool = False
    biases: Biases = "kept"

    def combine(self, m: Match, op: Builder, delta: fx.Node | Mapping[str, fx.Node]) -> dict[str, fx.Node]:
        """The attention's output over the longer keys and values."""
        assert isinstance(delta, Mapping), "rows are keys and values"
        return {self.port: attend_with_rows(m, op, delta["keys"], delta["values"], self.placed, self.biases)}

    def gate(self, m: Match, op: Builder, delta: fx.Node | Mapping[str, fx.Node], gate: fx.Node) -> dict[str, fx.Node]:
        """Both times the gate."""
        assert isinstance(delta, Mapping), "rows are keys and values"
        return {name: op.mul(rows, gate) for name, rows in delta.items()}


def attend_with_rows(
    m: Match, op: Builder, keys_1GLD: fx.Node, values_1GLD: fx.Node, placed: bool = False, biases: Biases = "kept"
) -> fx.Node:
    """The attention's output when every query also attends to L rows before the model's own keys and values.

        softmax(q [P_K; K]^T + [0, mask]) [P_V; V]

    The rows carry no position, no position bias falls on them, and no mask hides them.

    Args:
        m: a match of `attention.core`.
        op: the builder of the edit.
        keys_1GLD: (1, G, L, D), G and D as `key_head_shape` gives them.
        values_1GLD: (1, G, L, D), as `value_head_shape` gives them.
        placed: whether the rows have places all the same, before all tokens: then the model's masks and biases
            fall on them as on so many tokens more. Cross-attention knows no places.
        biases: of the distance, where the model looks them up in parameters and the rows have no places: "kept" leaves
            the tokens theirs, b(j - i) for key j and query i; "shifted" counts the keys from the first row on, and
            the queries from the first token, b(L + j - i) on tokens and b(p - i) on row p; "dropped" adds none.

    Raises:
        PeftGraphError: the attention is written in a form that rows cannot be added to, or its biases depend on more
            than places, or cannot be told from its mask.
        Conflict: another pass replaced this attention.
    """
    other = m.changed_by("output")
    if other is not None:
        raise Conflict(
            f"{op.pass_spec} and {other} both replace the output of {m.site.id}, and one would undo the other. "
            "Apply one of them."
        )
    shares = shares_of(m, op, int(keys_1GLD.meta["val"].shape[2]), placed, biases)
    return _computed(m, op, keys_1GLD, values_1GLD, shares)


def attend_to(m: Match, op: Builder, keys_1GLD: fx.Node, values_1GLD: fx.Node) -> fx.Node:
    """What the queries of an attention get from L rows of keys and values alone: softmax(q P_K^T) P_V, scaled as the
    model scales its own scores.

    Args:
        m: a match of `attention.core`.
        op: the builder of the edit.
        keys_1GLD: (1, G, L, D), G and D as `key_head_shape` gives them.
        values_1GLD: (1, G, L, D), as `value_head_shape` gives them.

    Raises:
        PeftGraphError: the attention is written in a form that rows cannot be led into.
    """
    return _computed(m, op, keys_1GLD, values_1GLD, None)


def per_head(m: Match, op: Builder, value: fx.Node, change: Callable[[fx.Node], fx.Node]) -> fx.Node:
    """`change` of a value like an attention's output, with heads on an axis of their own, (B, H, S, F), whether or not
    the attention has them so."""
    return each_by_head(op, value, axes_of(m, "output"), change)


def _computed(m: Match, op: Builder, keys: fx.Node, values: fx.Node, shares: Shares | None) -> fx.Node:
    for heads in (key_head_shape, value_head_shape):
        heads(m)
    keys, values = op.in_dtype_of(keys, m.value("k")), op.in_dtype_of(values, m.value("v"))
    core = m.names[m.site.op]
    if core.target is FUSED:
        return _fused(m, op, core, keys, values, shares) if shares else _fused_alone(m, op, core, keys, values)
    if "scores" in m.site.ports:
        return Written(m, op, keys, values).computed(shares)
    raise refusal(m, core)


def _with_rows(m: Match, op: Builder, rows_1GLD: fx.Node, port: str) -> fx.Node:
    """[rows; value] along the positions of an operand, in every example of the batch."""
    axes, value = axes_of(m, port), m.value(port)
    return op.call(aten.cat.default, [laid_out(op, rows_1GLD, axes, value), value], axes.positions)


# fused attention


def _fused(m: Match, op: Builder, core: fx.Node, keys: fx.Node, values: fx.Node, shares: Shares) -> fx.Node:
    length = int(keys.meta["val"].shape[2])
    q, k = m.value("q"), m.value("k")
    inputs = [q, _with_rows(m, op, keys, "k"), _with_rows(m, op, values, "v"), None]
    if m.has("mask"):
        inputs[3] = _mask_with_rows(op, m.value("mask"), k, length, shares)
    causal = bool(core.args[5]) if len(core.args) > 5 else bool(core.kwargs.get("is_causal", False))
    if causal:
        # The kernel's causal mask is aligned with the first query and the first key: as many empty queries in front
        # as there are rows keep it in place, and the kernel needs no mask of its own.
        sizes = [_size(op, q, axis) for axis in range(q.meta["val"].dim())]
        sizes[-2] = length
        inputs[0] = op.call(aten.cat.default, [op.call(aten.new_zeros.default, q, sizes), q], -2)
    named = {name: value for name, value in core.kwargs.items() if name not in ("query", "key", "value", "attn_mask")}
    out = op.call(FUSED, *inputs, *core.args[4:], **named)
    if causal:
        out = op.call(aten.slice.Tensor, out, -2, length, 2**63 - 1)
    return _in_memory_like(op, out, m.names[m.port("output")])


def _in_memory_like(op: Builder, value: fx.Node, old: fx.Node) -> fx.Node:
    """A value in the order of memory that the old one has, where the model takes views of that one."""
    if value.meta["val"].stride() == old.meta["val"].stride() or not _viewed_on(old):
        return value
    strides = old.meta["val"].stride()
    order = sorted(range(len(strides)), key=lambda axis: -hint(strides[axis]))
    plain = order == sorted(order)
    value = op.call(aten.contiguous.default, value if plain else op.call(aten.permute.default, value, order))
    return value if plain else op.call(aten.permute.default, value, [order.index(axis) for axis in range(len(order))])


def _viewed_on(value: fx.Node) -> bool:
    """Whether something reads a value, or what only moves its axes, as it lies in memory."""
    moved = ops.LAYOUT - COPYING
    return any(user.target in VIEWS_OF_MEMORY or (ops.name(user) in moved and _viewed_on(user)) for user in value.users)


def _fused_alone(m: Match, op: Builder, core: fx.Node, keys: fx.Node, values: fx.Node) -> fx.Node:
    q = m.value("q")
    rows = [laid_out(op, one, axes_of(m, port), m.value(port)) for one, port in ((keys, "k"), (values, "v"))]
    named = {name: value for name, value in core.kwargs.items() if name in ("scale", "dropout_p", "enable_gqa")}
    return op.call(FUSED, q, *rows, None, *core.args[4:5], **named)


def _mask_with_rows(op: Builder, mask: fx.Node, k: fx.Node, length: int, shares: Shares) -> fx.Node:
    """A mask with columns for the prepended rows, of any number of leading axes."""
    value = mask.meta["val"]
    queries = value.dim() - 2  # as many as the mask has then, should the sequence become longer
    sizes = [
        n if isinstance(n, int) and (i != queries or n == 1) else op.call(aten.sym_size.int, mask, i)
        for i, n in enumerate(value.shape)
    ]
    if sizes[-1] == 1:
        mask = op.call(aten.expand.default, mask, [*sizes[:-1], op.call(aten.sym_size.int, k, -2)])
    front = shares.front(mask)
    if front is None:
        fill = True if value.dtype == torch.bool else 0.0
        front = op.call(aten.new_full.default, mask, [*sizes[:-1], length], fill)
    elif [str(n) for n in front.meta["val"].shape[:-1]] != [str(n) for n in value.shape[:-1]]:
        front = op.call(aten.expand.default, front, [*sizes[:-1], length])
    return op.call(aten.cat.default, [front, shares.own(mask)], -1)


def _size(op: Builder, value: fx.Node, axis: int) -> int | fx.Node:
    size = value.meta["val"].shape[axis]
    return size if isinstance(size, int) else op.call(aten.sym_size.int, value, axis)
