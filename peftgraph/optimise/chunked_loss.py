"""Computes a cross-entropy over a vocabulary in chunks of rows, with the head's product inside.

The logits of all rows, their casts and their softmax are the largest values of a training step where the vocabulary is
large. They are needed only for the loss and for its gradient by the hidden states, which has the hidden states' size:
the forward pass computes both, chunk by chunk, and keeps that gradient alone (Hsu et al., Liger Kernel, 2024,
arXiv 2410.10989).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

aten = torch.ops.aten
CHUNK_VALUES = 2**22  # logits of a chunk
MEAN, SUM = 1, 2  # reductions, as torch numbers them
ROWWISE = {  # what may be between the head and the loss
    aten.view.default, aten.reshape.default, aten.contiguous.default, aten.to.dtype, aten.slice.Tensor,
    aten._to_copy.default,
}  # fmt: skip


def chunk_losses(graph: fx.Graph) -> tuple[int, ...]:
    """Replace, in place, each cross-entropy of a head's logits that only the loss and the output need.

    Returns:
        The positions of the outputs that were those logits; they are None now.
    """
    output = graph.output_node()
    dropped: list[int] = []
    for loss in [node for node in graph.nodes if node.target is aten.cross_entropy_loss.default]:
        chain = _chain(loss)
        if chain is None:
            continue
        rows = _hidden_rows(graph, chain, loss)
        leaves: Any = output.args[0]
        positions = [i for i, leaf in enumerate(leaves) if leaf in chain]
        output.args = ([None if i in positions else leaf for i, leaf in enumerate(leaves)],)
        _, weight, bias = (*chain[0].args, None)[:3]
        dtype = chain[-1].meta["val"].dtype
        with graph.inserting_before(loss):
            new = graph.call_function(chunked_cross_entropy, (rows, weight, bias, loss.args[1], dtype, *_options(loss)))
        new.meta = dict(loss.meta)
        loss.replace_all_uses_with(new)
        for node in (loss, *reversed(chain)):
            graph.erase_node(node)
        dropped += positions
    return tuple(dropped)


def _chain(loss: fx.Node) -> list[fx.Node] | None:
    """Return the nodes from the head's product to the logits that a loss reads, if nothing but outputs reads them."""
    given: dict[int, Any] = dict(enumerate(loss.args))
    plain = given.get(2) is None and given.get(5, 0.0) == 0.0 and not loss.kwargs
    if not plain or _options(loss)[0] not in (MEAN, SUM):
        return None
    if given[0].meta["val"].dim() != 2 or given[1].meta["val"].is_floating_point():
        return None  # classes on another axis, or probabilities of classes
    chain: list[fx.Node] = []
    node: Any = given[0]
    while isinstance(node, fx.Node):
        reader = chain[0] if chain else loss
        if any(user is not reader and user.op != "output" for user in node.users):
            return None
        chain.insert(0, node)
        if node.target is aten.linear.default:
            weight: Any = node.args[1]
            return chain if weight.op == "get_attr" else None
        if node.target not in ROWWISE or not _keeps_rows(node):
            return None
        node = node.args[0]
    return None


def _keeps_rows(node: fx.Node) -> bool:
    """Return True if each row of the result is a row of the operand: the vocabulary stays the last axis."""
    source: Any = node.args[0]
    before, after = source.meta["val"].shape, node.meta["val"].shape
    if node.target is aten.slice.Tensor and len(node.args) > 1 and node.args[1] in (-1, len(before) - 1):
        return False
    return isinstance(after[-1], int) and before[-1] == after[-1]


def _options(loss: fx.Node) -> tuple[Any, Any]:
    """Return the reduction and the ignored class of a loss."""
    given: dict[int, Any] = dict(enumerate(loss.args))
    return given.get(3, MEAN), given.get(4, -100)


def _hidden_rows(graph: fx.Graph, chain: list[fx.Node], loss: fx.Node) -> Any:
    """Return the rows of the hidden states that the logits' rows are computed from."""
    head = chain[0]
    rows: Any = head.args[0]
    width = rows.meta["val"].shape[-1]
    with graph.inserting_before(loss):
        for node in chain[1:]:
            if node.target in (aten.view.default, aten.reshape.default):
                sizes: Any = node.args[1]
                rows = graph.call_function(aten.reshape.default, (rows, [*sizes[:-1], width]))
            elif node.target is aten.slice.Tensor:
                rows = graph.call_function(aten.slice.Tensor, (rows, *node.args[1:]))
    return rows


def chunked_cross_entropy(
    rows: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, dtype: torch.dtype, reduction: int, ignored: int
) -> Tensor:
    """Return the cross-entropy of softmax(h W^T + b).

    Args:
        rows: h (N, H).
        weight: W (V, H).
        bias: b (V,) or None.
        target: (N,) int64, the classes.
        dtype: of the logits in the loss.
        reduction: 1 for the mean over the classes that are not ignored, 2 for the sum.
        ignored: the class that does not count.
    """
    return _ChunkedLoss.apply(rows, weight, bias, target, dtype, reduction, ignored)


class _ChunkedLoss(torch.autograd.Function):
    """The loss, which keeps its gradients from the forward pass on."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, dtype: torch.dtype,
        reduction: int, ignored: int,
    ) -> Tensor:  # fmt: skip
        by_rows, by_weight, by_bias = ctx.needs_input_grad[:3]
        count = (target != ignored).sum() if reduction == MEAN else None
        total = torch.zeros((), dtype=dtype, device=rows.device)
        grads = [
            torch.empty_like(rows, memory_format=torch.contiguous_format) if by_rows else None,
            torch.zeros_like(weight) if by_weight else None,
            torch.zeros_like(bias) if by_bias and bias is not None else None,
        ]
        step = max(1, CHUNK_VALUES // weight.shape[0])
        for start in range(0, rows.shape[0], step):
            part, classes = rows[start : start + step], target[start : start + step]
            logits = F.linear(part, weight, bias).to(dtype)
            total += F.cross_entropy(logits, classes, reduction="sum", ignore_index=ignored)
            if not any(ctx.needs_input_grad[:3]):
                continue
            by_logits = _gradient(logits, classes, ignored)
            if count is not None:
                by_logits /= count
            by_logits = by_logits.to(part.dtype)
            if grads[0] is not None:
                torch.mm(by_logits, weight, out=grads[0][start : start + step])
            if grads[1] is not None:
                grads[1].addmm_(by_logits.t(), part)
            if grads[2] is not None:
                grads[2] += by_logits.sum(0)
        ctx.places = [i for i, one in enumerate(grads) if one is not None]
        ctx.save_for_backward(*(one for one in grads if one is not None))
        return total / count if count is not None else total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        found: list[Any] = [None] * 7
        for i, kept in zip(ctx.places, ctx.saved_tensors, strict=True):
            found[i] = kept * grads[0].to(kept.dtype)
        return tuple(found)


def _gradient(logits: Tensor, target: Tensor, ignored: int) -> Tensor:
    """Return the gradient of the summed loss by the logits; rows that are ignored have none."""
    counted = target != ignored
    grad = torch.softmax(logits, -1)
    classes = torch.where(counted, target, 0).unsqueeze(-1)
    grad.scatter_add_(-1, classes, -torch.ones_like(classes, dtype=grad.dtype))
    return grad.mul_(counted.unsqueeze(-1))
