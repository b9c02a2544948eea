"""Positions of a sequence: which hold tokens, as the attention over them has it, and which are first and last."""

from __future__ import annotations

import torch
from torch import fx

from peftgraph.errors import PeftGraphError
from peftgraph.ir.builder import Builder
from peftgraph.rewrite.match import Match
from peftgraph.sites import attention, kind

aten = torch.ops.aten

FUSED = aten.scaled_dot_product_attention.default
HIDDEN = -5e3  # what hides a key lowers its score to -1e4 at most, and no model's own scores reach half of that


def token_mask(m: Match, op: Builder) -> fx.Node:
    """Return booleans (B, S): which positions of the site's sequence contain tokens.

    A position contains a token if its own query may attend to its own key: causal masks, windows and position biases
    never hide that key, only padding does. So the form of the model's mask does not matter, nor whether 1 or 0 means
    padding. Without a mask all positions contain tokens. One value serves all sites of the stack that an application of
    a pass edits.

    Raises:
        PeftGraphError: no self-attention of the site's stack shows it, or it continues an earlier sequence.
    """
    stack = m.site.stack
    cores = [one for one in m.related(attention.core & kind("self")) if one.site.stack == stack]
    if not cores:
        raise PeftGraphError(
            f"There is no self-attention in the stack of {m.site.id}, so it is unknown which positions are padding."
        )
    return op.shared_value(f"{stack} real positions", lambda: _sees_itself(cores[0], op))


def _sees_itself(core: Match, op: Builder) -> fx.Node:
    node, q = core.names[core.site.op], core.value("q")
    mask = core.value("mask") if core.has("mask") else None
    scores = mask if node.target is FUSED else node.args[0]
    by_head = q if q.meta["val"].dim() == 4 else scores  # queries may have heads and batch on one axis
    if not isinstance(by_head, fx.Node) or by_head.meta["val"].dim() != 4:
        raise PeftGraphError(f"The queries of {core.site.id} are no (batch, heads, positions, features).")
    batch, length = op.call(aten.sym_size.int, by_head, 0), op.call(aten.sym_size.int, q, -2)
    if scores is None:
        return op.call(aten.ones.default, [batch, length], dtype=torch.bool, device=op.device)
    assert isinstance(scores, fx.Node)
    sizes = scores.meta["val"].shape
    if sizes[-1] != 1 and str(sizes[-1]) != str(q.meta["val"].shape[-2]):
        raise PeftGraphError(f"{core.site.id} has {sizes[-1]} keys for its queries: it continues an earlier sequence.")
    for _ in range(4 - len(sizes)):
        scores = op.call(aten.unsqueeze.default, scores, 0)
    head_BSS = op.call(aten.expand.default, op.call(aten.select.int, scores, 1, 0), [batch, length, length])
    own_BS = op.call(aten.diagonal.default, head_BSS, 0, -2, -1)
    return own_BS if own_BS.meta["val"].dtype == torch.bool else op.call(aten.gt.Scalar, own_BS, HIDDEN)


def first_and_last_masks(op: Builder, real_BS: fx.Node, first: int, last: int) -> tuple[fx.Node, fx.Node]:
    """Twice (B, S) booleans: the `first` and the `last` ones among the positions that `real_BS` holds true.

    No position is both: it belongs to the end that is nearer, the middle one to the last.
    """

    def both(a: fx.Node, b: fx.Node) -> fx.Node:
        return op.call(aten.logical_and.default, a, b)

    backwards_BS = op.call(aten.cumsum.default, op.call(aten.flip.default, real_BS, [1]), 1)
    front_BS, back_BS = op.call(aten.cumsum.default, real_BS, 1), op.call(aten.flip.default, backwards_BS, [1])
    in_first, in_last = (
        both(real_BS, op.call(aten.le.Scalar, number_BS, size))
        for number_BS, size in ((front_BS, first), (back_BS, last))
    )
    nearer = op.call(
        aten.logical_or.default, op.call(aten.logical_not.default, in_first), op.call(aten.le.Tensor, back_BS, front_BS)
    )
    in_last = both(in_last, nearer)
    return both(in_first, op.call(aten.logical_not.default, in_last)), in_last
