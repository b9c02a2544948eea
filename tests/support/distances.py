"""T5's attention with a prefix that its keys are counted from, from the equation, inside the original model. For tests.

Shapes: B batch, H heads, S queries, T keys, L rows, F features of a head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from attended import Rows
from torch import Tensor, nn

Counted = tuple[Tensor, Tensor, Tensor]  # P_K and P_V, (L, H F) each, and the biases, (H, S, L + T), or one for all


def distances(stack: nn.Module, queries: int, keys: int) -> Tensor:
    """b(j - i) for key j and query i, (H, S, N), each looked up by its bucket: half of the buckets hold one distance
    each, and the others as many more as reach 128 in equal steps of the logarithm."""
    table = stack.get_parameter("block.0.layer.0.SelfAttention.relative_attention_bias.weight")
    both, buckets = not stack.is_decoder, len(table)
    buckets = buckets // 2 if both else buckets
    exact = buckets // 2
    biases = torch.empty(queries, keys, table.shape[1], dtype=table.dtype)
    for i in range(queries):
        for j in range(keys):
            far = abs(j - i) if both else max(i - j, 0)
            steps = (
                exact if far < exact else exact + int(math.log(far / exact) / math.log(128 / exact) * (buckets - exact))
            )
            bucket = far if far < exact else min(steps, buckets - 1)
            biases[i, j] = table[bucket + (buckets if both and j > i else 0)]
    return biases.permute(2, 0, 1)


def with_counted(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, rows: Counted) -> Tensor:
    """softmax(q [P_K; k]^T + biases) [P_V; v], where the mask hides tokens; what else it adds is left out."""
    key, value = (row.unflatten(-1, (k.shape[1], -1)).transpose(0, 1).expand(len(k), -1, -1, -1) for row in rows[:2])
    hidden = torch.cat([mask.new_zeros(*mask.shape[:-1], key.shape[2]), mask], -1) < -1e30
    scores = q @ torch.cat([key, k], 2).transpose(-2, -1) * scale + rows[2]
    return scores.masked_fill(hidden, -math.inf).softmax(-1) @ torch.cat([value, v], 2)


def counted(
    model: nn.Module, rows: Sequence[Rows], inputs: dict[str, Tensor], dropped: Sequence[str] = ()
) -> list[Counted]:
    """The rows of T5's attentions, in their order, with the biases of each; those of `dropped` stacks have none."""
    layers, none = model.config.num_layers, torch.zeros(())
    length = len(rows[0][0])
    found: dict[str, Tensor] = {}
    for stack, name in (("encoder", "input_ids"), ("decoder", "decoder_input_ids")):
        size = inputs[name].shape[1]
        found[stack] = none if stack in dropped else distances(model.get_submodule(stack), size, length + size)
    biases = [found["encoder"]] * layers + [found["decoder"], none] * model.config.num_decoder_layers
    return [(key, value, bias) for (key, value), bias in zip(rows, biases, strict=True)]
