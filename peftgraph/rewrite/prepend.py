"""Attention over more rows: keys and values of a pass's own in front of the model's, in the attention itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx

from peftgraph.errors import Conflict, PeftGraphError
from peftgraph.ir.builder import Builder
from peftgraph.rewrite.biases import MASKS, Biases, Shares, shares_of
from peftgraph.rewrite.match import Match

aten = torch.ops.aten

FUSED = aten.scaled_dot_product_attention.default
SCALES = {
    aten.mul.Tensor,
    aten.mul.Scalar,
    aten.div.Tensor,
    aten.div.Scalar,
    aten.mul_.Tensor,
    aten.div_.Tensor,
    aten.to.dtype,
    aten.tanh.default,
    aten.contiguous.default,
}
PRODUCTS = {aten.matmul.default, aten.bmm.default}
WEIGHTS = {aten.to.dtype, aten.dropout.default, aten.contiguous.default, *PRODUCTS}
Bias = Callable[[fx.Node], fx.Node | None]  # of a mask or bias: what of it falls on some keys, or nothing
VIEWS = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}


def key_heads(m: Match) -> tuple[int, int]:
    """(heads, features of one) of an attention's keys, before they are repeated for the queries that share them.

    Raises:
        PeftGraphError: the site is no attention core, or its keys are no (batch, heads, positions, features).
    """
    return _heads_of(m, "keys")


def value_heads(m: Match) -> tuple[int, int]:
    """(heads, features of one) of an attention's values; like `key_heads`."""
    return _heads_of(m, "values")


def _heads_of(m: Match, port: str) -> tuple[int, int]:
    if not m.has(port):
        raise PeftGraphError(f"{m.site.id} is no attention core, so it has no {port}; choose attention.core.")
    shape = m.value(port).meta["val"].shape
    if len(shape) != 4 or not isinstance(shape[1], int):
        sizes = " x ".join(map(str, shape))
        raise PeftGraphError(
            f"The {port} of {m.site.id} are {sizes}: rows can be put before (batch, heads, positions, features) only. "
            'Load the model with attn_implementation="sdpa".'
        )
    return int(shape[1]), int(shape[3])


@dataclass(frozen=True)
class Rows:
    """Keys and values in front of an attention's own: the delta gives both, `{"keys": ..., "values": ...}`.

    Both are (1, G, L, D), or (B, G, L, D) for rows that differ by example, as `key_heads` and `value_heads` give G, D.

    Attributes:
        port: the attention's output.
        placed: whether the rows have places, in front of all tokens; see `prepend`.
        biases: what becomes of the model's biases of the distance; see `prepend`.
    """

    port: str = "output"
    placed: bool = False
    biases: Biases = "kept"

    def entered(self, m: Match, op: Builder, delta: fx.Node | Mapping[str, fx.Node]) -> dict[str, fx.Node]:
        """The attention's output over the longer keys and values."""
        assert isinstance(delta, Mapping), "rows are keys and values"
        return {self.port: prepend(m, op, delta["keys"], delta["values"], self.placed, self.biases)}

    def gated(self, m: Match, op: Builder, delta: fx.Node | Mapping[str, fx.Node], gate: fx.Node) -> dict[str, fx.Node]:
        """Both times the gate."""
        assert isinstance(delta, Mapping), "rows are keys and values"
        return {name: op.mul(rows, gate) for name, rows in delta.items()}


def prepend(
    m: Match, op: Builder, keys_1GLD: fx.Node, values_1GLD: fx.Node, placed: bool = False, biases: Biases = "kept"
) -> fx.Node:
    """The attention's output when every query also attends to L rows in front of the model's own keys and values.

        softmax(q [P_K; K]^T + [0, mask]) [P_V; V]

    The rows carry no position, no position bias falls on them, and no mask hides them.

    Args:
        m: a match of `attention.core`.
        op: the builder of the edit.
        keys_1GLD: (1, G, L, D), G and D as `key_heads` gives them.
        values_1GLD: (1, G, L, D), as `value_heads` gives them.
        placed: whether the rows have places all the same, in front of all tokens: then the model's masks and biases
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
            f"{op.maker} and {other} both replace the output of {m.site.id}, and one would undo the other. "
            "Apply one of them."
        )
    shares = shares_of(m, op, int(keys_1GLD.meta["val"].shape[2]), placed, biases)
    return _computed(m, op, keys_1GLD, values_1GLD, shares)


def attend(m: Match, op: Builder, keys_1GLD: fx.Node, values_1GLD: fx.Node) -> fx.Node:
    """What the queries of an attention get from L rows of keys and values alone: softmax(q P_K^T) P_V, scaled as the
    model scales its own scores.

    Args:
        m: a match of `attention.core`.
        op: the builder of the edit.
        keys_1GLD: (1, G, L, D), G and D as `key_heads` gives them.
        values_1GLD: (1, G, L, D), as `value_heads` gives them.

    Raises:
        PeftGraphError: the attention is written in a form that rows cannot be led into.
    """
    return _computed(m, op, keys_1GLD, values_1GLD, None)


def each_head(m: Match, op: Builder, value: fx.Node, change: Callable[[fx.Node], fx.Node]) -> fx.Node:
    """`change` of a value like an attention's output, with heads on an axis of their own, (B, H, S, F), whether or not
    the attention has them so."""
    return _like(op, value, change(_by_head(m, op, value)))


def _computed(m: Match, op: Builder, keys: fx.Node, values: fx.Node, shares: Shares | None) -> fx.Node:
    for heads in (key_heads, value_heads):
        heads(m)
    core = m.names[m.site.op]
    if core.target is FUSED:
        return _fused(m, op, core, keys, values, shares) if shares else _fused_alone(m, op, core, keys, values)
    if core.target in (aten.softmax.int, aten._softmax.default):
        return _written(m, op, core, keys, values, shares)
    raise _refusal(m, core)


def _refusal(m: Match, node: fx.Node) -> PeftGraphError:
    label = node.meta.get("label", node.name)
    return PeftGraphError(
        f"{m.site.id} computes its attention by way of %{label} ({node.target}), past which no rows of keys and values "
        'can be led. Load the model with attn_implementation="sdpa" where it has it.'
    )


def _for_queries(op: Builder, rows_1GLD: fx.Node, heads: int) -> fx.Node:
    """(1, G, L, D) -> (1, H, L, D): each head of keys in place for the queries that share it."""
    groups = int(rows_1GLD.meta["val"].shape[1])
    return rows_1GLD if groups == heads else op.call(aten.repeat_interleave.self_int, rows_1GLD, heads // groups, 1)


def _by_head(m: Match, op: Builder, value: fx.Node) -> fx.Node:
    """(B, H, S, D) of (B H, S, D); what is by head already, as it is."""
    heads, flat = m.site.heads, value.meta["val"].dim() == 3
    return op.call(aten.unflatten.int, value, 0, [-1, heads]) if flat else value


def _like(op: Builder, value: fx.Node, by_head: fx.Node) -> fx.Node:
    """A value by head with as many axes as `value` has: the inverse of `_by_head`."""
    return op.call(aten.flatten.using_ints, by_head, 0, 1) if value.meta["val"].dim() == 3 else by_head


def _in_front(m: Match, op: Builder, rows_1GLD: fx.Node, value: fx.Node) -> fx.Node:
    """[rows; value] along the positions, in every example of the batch."""
    value_BHTD = _by_head(m, op, value)
    return _like(op, value, op.call(aten.cat.default, [_instead(op, rows_1GLD, value_BHTD), value_BHTD], -2))


def _instead(op: Builder, rows_1GLD: fx.Node, value_BHTD: fx.Node) -> fx.Node:
    """The rows in every example of the batch, and for every head."""
    rows = _for_queries(op, rows_1GLD, int(value_BHTD.meta["val"].shape[1]))
    batch = op.call(aten.sym_size.int, value_BHTD, 0)
    return op.call(aten.expand.default, rows, [batch, -1, -1, -1])


# fused attention


def _fused(m: Match, op: Builder, core: fx.Node, keys: fx.Node, values: fx.Node, shares: Shares) -> fx.Node:
    length = int(keys.meta["val"].shape[2])
    q, k, v = (m.value(port) for port in "qkv")
    inputs = [q, _in_front(m, op, keys, k), _in_front(m, op, values, v), None]
    if m.has("mask"):
        inputs[3] = _longer(op, m.value("mask"), k, length, shares)
    causal = bool(core.args[5]) if len(core.args) > 5 else bool(core.kwargs.get("is_causal", False))
    if causal:
        # The kernel's causal mask is aligned with the first query and the first key: as many empty queries in front
        # as there are rows keep it in place, and the kernel needs no mask of its own.
        sizes = [op.call(aten.sym_size.int, q, 0), int(q.meta["val"].shape[1]), length, int(q.meta["val"].shape[3])]
        inputs[0] = op.call(aten.cat.default, [op.call(aten.new_zeros.default, q, sizes), q], -2)
    named = {name: value for name, value in core.kwargs.items() if name not in ("query", "key", "value", "attn_mask")}
    out = op.call(FUSED, *inputs, *core.args[4:], **named)
    return op.call(aten.slice.Tensor, out, -2, length, 2**63 - 1) if causal else out


def _fused_alone(m: Match, op: Builder, core: fx.Node, keys: fx.Node, values: fx.Node) -> fx.Node:
    q = m.value("q")
    rows = [_instead(op, one, q) for one in (keys, values)]
    named = {name: value for name, value in core.kwargs.items() if name in ("scale", "dropout_p")}
    return op.call(FUSED, q, *rows, None, *core.args[4:5], **named)


def _longer(op: Builder, mask: fx.Node, k: fx.Node, length: int, shares: Shares) -> fx.Node:
    """A mask with columns for the rows in front, of any number of leading axes."""
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


# attention written out


def _written(m: Match, op: Builder, core: fx.Node, keys: fx.Node, values: fx.Node, shares: Shares | None) -> fx.Node:
    product, scores, output = m.names[m.site.ports["product"]], core.args[0], m.names[m.port("output")]
    assert isinstance(scores, fx.Node)
    q, v = m.value("q"), m.value("v")
    axis = core.args[1] if isinstance(core.args[1], int) else 0
    last = axis % scores.meta["val"].dim() == scores.meta["val"].dim() - 1
    if product.target not in PRODUCTS or product.args[0] is not q or not last:
        raise _refusal(m, product)
    if q.meta["val"].dim() == 3 and m.site.heads is None:
        raise _refusal(m, q)
    front = _scaled(m, op, product, scores, _own_scores(m, op, product, q, keys), (shares or Shares()).front)
    if shares is None:
        copies = {scores: front, v: _like(op, v, _instead(op, values, _by_head(m, op, v)))}
    else:
        own = _scaled(m, op, product, scores, product, shares.own)
        copies = {scores: op.call(aten.cat.default, [front, own], -1), v: _in_front(m, op, values, v)}
    for node in _tensors(op.between(scores, output)):
        if node is core or node.target in WEIGHTS:
            copies[node] = op.copy(node, copies)
        else:
            copies[node] = _viewed(m, op, node, copies)
    return copies[output]


def _own_scores(m: Match, op: Builder, product: fx.Node, q: fx.Node, keys_1GLD: fx.Node) -> fx.Node:
    """q P_K^T, times what the model scales its keys by on their way into the product."""
    q_BHSD = _by_head(m, op, q)
    rows = _for_queries(op, keys_1GLD, int(q_BHSD.meta["val"].shape[1]))
    own = _like(op, q, op.call(aten.matmul.default, q_BHSD, op.call(aten.transpose.int, rows, -2, -1)))
    start, k = m.names[m.site.ports["keys"]], product.args[1]
    assert isinstance(k, fx.Node)
    way = [start, *_tensors(op.between(start, k))] if start is not k else []
    for node in way[1:]:
        if node.target in SCALES and node.meta["val"].dim() == q.meta["val"].dim():
            signal = next(one for one in node.all_input_nodes if one in way)
            own = op.copy(node, {signal: own})
    return own


def _scaled(m: Match, op: Builder, product: fx.Node, scores: fx.Node, raw: fx.Node, bias: Bias) -> fx.Node:
    """What the model does to its scores done to `raw`, with what `bias` gives of the masks and biases it adds."""
    inside = {product, *_tensors(op.between(product, scores))}
    copies = {product: raw}
    for node in _tensors(op.between(product, scores)):
        signal = next(one for one in node.all_input_nodes if one in inside)
        others = _tensors(one for one in node.all_input_nodes if one is not signal)
        if node.target in MASKS and others:
            found = {one: bias(one) for one in others}
            new = {one: value for one, value in found.items() if value is not None}
            copies[node] = _again(op, node, new | {signal: copies[signal]}) if new else copies[signal]
        elif copies[signal] is signal:
            copies[node] = node
        elif node.target in SCALES and all(_is_one_for_all_keys(one) for one in others):
            copies[node] = op.copy(node, copies)
        else:
            copies[node] = _viewed(m, op, node, copies)
    return copies[scores]


def _again(op: Builder, node: fx.Node, copies: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """The call of `node` with other operands, or `node` itself where they are the same."""
    return node if all(old is new for old, new in copies.items()) else op.copy(node, copies)


def _viewed(m: Match, op: Builder, node: fx.Node, copies: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """The view of `node` of a copy that has more keys: heads and batch are joined or parted, keys stay apart."""
    source = node.args[0]
    if node.target not in VIEWS or not isinstance(source, fx.Node) or source not in copies:
        raise _refusal(m, node)
    before, after = (one.meta["val"].shape[-1] for one in (source, node))
    if str(before) != str(after):
        raise _refusal(m, node)
    *sizes, _ = cast(list[Any], node.args[1])
    return op.call(aten.reshape.default, copies[source], [*sizes, _size(op, copies[source], -1)])


def _size(op: Builder, value: fx.Node, axis: int) -> int | fx.Node:
    size = value.meta["val"].shape[axis]
    return size if isinstance(size, int) else op.call(aten.sym_size.int, value, axis)


def _tensors(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """Those whose values are tensors, and not sizes."""
    return [node for node in nodes if isinstance(node.meta["val"], torch.Tensor)]


def _is_one_for_all_keys(node: fx.Node) -> bool:
    shape = node.meta["val"].shape
    return len(shape) == 0 or shape[-1] == 1
