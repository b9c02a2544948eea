"""LoftQ (Li et al., 2023): codes and low-rank factors that are chosen together for a weight.

    repeat:  codes <- quantise(W - s B A);   s B A <- the best approximation of rank R of W - D,   D what the codes say

Shapes: I in, O out, R rank; E experts as axis 0 where the weight is a stack.
Source: arXiv 2310.08659, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from peftgraph.errors import Conflict, PeftGraphError
from peftgraph.ir.builder import Builder
from peftgraph.ir.quantised import QuantisedWeight
from peftgraph.rewrite.match import Match

Start = Callable[[Tensor], object]


def loftq(m: Match, op: Builder, rank: int, scale: float, iterations: int) -> tuple[Start, Start]:
    """Give a quantised weight other codes, in place of those that it has, and returns what fills A and B.

    Args:
        m: a site whose whole weight a pass before put codes in the place of.
        op: the builder of the edit.
        rank: R.
        scale: s.
        iterations: how often codes and factors are made.

    Raises:
        PeftGraphError: the weight is not quantised by a pass, is part of another one, or is known by its codes alone.
        Conflict: another adapter has chosen the codes already.
    """
    how, weight_OI = _known(m)
    if weight_OI.device.type == "meta":
        return torch.zero_, torch.zero_  # nothing is filled there
    assert how.remake is not None
    a_RI, b_OR = torch.zeros(()), torch.zeros(())
    change_OI = torch.zeros_like(weight_OI)
    tensors: dict[str, Tensor] = {}
    for _ in range(iterations):
        tensors = how.remake(weight_OI - change_OI)
        stored = {name: m.table[name].tensor for name in how.tensors} | tensors
        left_OI = weight_OI - _matrix(how, stored).to(weight_OI.dtype)
        u_OK, s_K, v_KI = torch.linalg.svd(left_OI, full_matrices=False)
        root_R = (s_K[..., :rank] / scale).sqrt()
        a_RI, b_OR = root_R.unsqueeze(-1) * v_KI[..., :rank, :], u_OK[..., :rank] * root_R.unsqueeze(-2)
        change_OI = scale * b_OR @ a_RI
    op.rewrite_codes({name: replace(m.table[name], tensor=value) for name, value in tensors.items()}, m.table)
    return lambda tensor: tensor.copy_(a_RI), lambda tensor: tensor.copy_(b_OR)


def _matrix(how: QuantisedWeight, tensors: dict[str, Tensor]) -> Tensor:
    return replace(how, transposed=False).value(tensors)


def _known(m: Match) -> tuple[QuantisedWeight, Tensor]:
    """How the weight is computed from codes, and what it was before, (O, I)."""
    view = m.weight.view
    entry = m.table[view.parameter]
    how = entry.quantised
    if how is None or how.remake is None:
        raise PeftGraphError(
            f'{m.site.id}: init="loftq" chooses the codes of {view.parameter} anew, and no pass has put codes in its '
            "place. Apply quantise before it."
        )
    if view.window is not None or m.site.role == "embedding" or m.at_weight:
        raise PeftGraphError(
            f'{m.site.id}: init="loftq" needs a projection of its own, and {view} is a part of a weight, or a table. '
            "Choose other sites, or another start there."
        )
    if entry.base_tensor is None:
        raise PeftGraphError(
            f'{m.site.id}: init="loftq" starts from {view.parameter} as it was, which is known by its codes alone.'
        )
    if any(m.table[name].base_tensor is not None for name in how.tensors):
        raise Conflict(f'{m.site.id}: the codes of {view.parameter} were chosen for another adapter by init="loftq".')
    full = entry.base_tensor.detach()
    return how, view.get(full).to(torch.promote_types(full.dtype, torch.float32))
