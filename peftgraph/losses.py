"""Losses and scores of the T-Few recipe, over several answer choices for one input.

    L = L_LM + L_UL + L_LN         the sum is not weighted

Shapes: B inputs, C choices, T tokens of a choice, V vocabulary. `logits_BCTV` are the model's, of any floating dtype,
aligned with the tokens they predict; `tokens_BCT` are integers, and `mask_BCT` is true where a token belongs to the
choice and false on padding, whose tokens may be anything from 0 to V - 1. `correct_B` numbers the right choice.
A choice has at least one token.
Source: arXiv 2205.05638, section 3.2; r-three/t-few, models/EncoderDecoder.py.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from peftgraph.errors import CallError


def token_log_probabilities(logits_BCTV: Tensor, tokens_BCT: Tensor) -> Tensor:
    """Return the log-probability of every token, (B, C, T).

    Raises:
        CallError: the shapes do not fit.
    """
    if logits_BCTV.dim() != 4 or logits_BCTV.shape[:-1] != tokens_BCT.shape:
        raise CallError(
            f"Expected logits (B, C, T, V) and tokens (B, C, T), got {tuple(logits_BCTV.shape)} and "
            f"{tuple(tokens_BCT.shape)}."
        )
    return logits_BCTV.log_softmax(-1).gather(-1, tokens_BCT.unsqueeze(-1)).squeeze(-1)


def choice_scores(logits_BCTV: Tensor, tokens_BCT: Tensor, mask_BCT: Tensor, power: float = 1.0) -> Tensor:
    """Return beta (B, C): the sum of a choice's log-probabilities, divided by its length to the power `power`; 1 gives
    the mean, 0 the sum.

    Rank classification picks the choice with the largest score: `choice_scores(...).argmax(-1)`.

    Raises:
        CallError: the shapes do not fit, or a choice is empty.
    """
    if mask_BCT.shape != tokens_BCT.shape:
        raise CallError(f"Expected a mask {tuple(tokens_BCT.shape)}, got {tuple(mask_BCT.shape)}.")
    length_BC = mask_BCT.sum(-1)
    if not bool((length_BC > 0).all()):
        raise CallError("A choice has no token: its mask is all false. Every choice needs at least one.")
    logs_BCT = token_log_probabilities(logits_BCTV, tokens_BCT).masked_fill(~mask_BCT, 0.0)
    return logs_BCT.sum(-1) / length_BC.to(logs_BCT.dtype) ** power


def language_modelling(logits_BCTV: Tensor, tokens_BCT: Tensor, mask_BCT: Tensor, correct_B: Tensor) -> Tensor:
    """L_LM, a scalar: the mean cross-entropy of the tokens of the right choices, over all tokens of the batch."""
    rows = torch.arange(len(correct_B), device=correct_B.device)
    logs_BT = token_log_probabilities(logits_BCTV, tokens_BCT)[rows, correct_B]
    return -logs_BT[mask_BCT[rows, correct_B]].mean()


def unlikelihood(
    logits_BCTV: Tensor,
    tokens_BCT: Tensor,
    mask_BCT: Tensor,
    correct_B: Tensor,
    epsilon: float = 0.0,
    masked_terms: bool = False,
) -> Tensor:
    """L_UL, a scalar: -sum log(1 - p) over the tokens of wrong choices, over their number.

    The authors' code differs twice: it adds `epsilon` = 1e-2 inside the logarithm, and gives padding and right choices
    log p = -100, so that each of them still adds -log(1 + epsilon) to the sum but not to the number: `epsilon=1e-2`,
    `masked_terms=True`. With epsilon 0 a wrong token of probability 1 costs infinitely much.

    Raises:
        CallError: there is no wrong token.
    """
    logs_BCT = token_log_probabilities(logits_BCTV, tokens_BCT)
    choices = torch.arange(tokens_BCT.shape[1], device=correct_B.device)
    wrong_BCT = mask_BCT & (choices != correct_B.unsqueeze(-1)).unsqueeze(-1)
    count = int(wrong_BCT.sum())
    if count == 0:
        raise CallError("There is no wrong token: the unlikelihood loss needs at least one wrong choice.")
    kept = logs_BCT[wrong_BCT]
    costs = -(1 - kept.exp() + epsilon).log()
    total = costs.sum()
    if masked_terms:
        total = total - (wrong_BCT.numel() - count) * math.log(1.0 - math.exp(-100.0) + epsilon)
    return total / count


def length_normalised(
    logits_BCTV: Tensor, tokens_BCT: Tensor, mask_BCT: Tensor, correct_B: Tensor, power: float = 1.0
) -> Tensor:
    """L_LN, a scalar: the cross-entropy of a softmax over the choices' scores beta, the mean over the inputs."""
    return cross_entropy(choice_scores(logits_BCTV, tokens_BCT, mask_BCT, power), correct_B)


def t_few(
    logits_BCTV: Tensor,
    tokens_BCT: Tensor,
    mask_BCT: Tensor,
    correct_B: Tensor,
    *,
    epsilon: float = 0.0,
    masked_terms: bool = False,
) -> Tensor:
    """L_LM + L_UL + L_LN, a scalar."""
    arguments = (logits_BCTV, tokens_BCT, mask_BCT, correct_B)
    return (
        language_modelling(*arguments)
        + unlikelihood(*arguments, epsilon=epsilon, masked_terms=masked_terms)
        + length_normalised(*arguments)
    )


def adapter_sums(
    values: Tensor, adapter_ids_B: Tensor, count: int, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return for each of `count` adapters, (N,), the sum of the values of its own rows, and how many they are.

    Args:
        values: (B, ...).
        adapter_ids_B: the number of each row's adapter, from 1; rows of 0 count for none.
        count: N.
        mask: which values count, (B, ...); all by default.

    Raises:
        CallError: the shapes do not fit.
    """
    if adapter_ids_B.shape != values.shape[:1] or (mask is not None and mask.shape != values.shape):
        shapes = [tuple(one.shape) for one in (values, adapter_ids_B, mask) if one is not None]
        raise CallError(f"Expected values (B, ...), the adapters of B rows and a mask like the values, got {shapes}.")
    kept = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
    sums_B = torch.where(kept, values, torch.zeros_like(values)).reshape(len(values), -1).sum(-1)
    numbers_B = kept.reshape(len(values), -1).sum(-1)
    sums = values.new_zeros(count + 1).index_add(0, adapter_ids_B, sums_B)
    numbers = numbers_B.new_zeros(count + 1).index_add(0, adapter_ids_B, numbers_B)
    return sums[1:], numbers[1:]


def adapter_means(values: Tensor, adapter_ids_B: Tensor, count: int, mask: Tensor | None = None) -> Tensor:
    """Return for each of `count` adapters, (N,), the mean of the values of its own rows; 0 where it has none.

    The sum of these means of a loss is the loss of a batch in which adapters train together: the gradient of each
    adapter's parameters is the one that it has alone. Arguments and errors as for `adapter_sums`.
    """
    sums, numbers = adapter_sums(values, adapter_ids_B, count, mask)
    return sums / numbers.clamp(min=1)


def label_losses(logits: Tensor, labels: Tensor, shift: bool = False, ignored: int = -100) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy of each label, and which labels count, both in the shape of the labels.

    Args:
        logits: (B, C) or (B, S, V).
        labels: (B,) or (B, S).
        shift: whether the logits of a token predict the label of the next one, as in causal language models; the first
            label is not predicted then.
        ignored: a label that does not count.

    Raises:
        CallError: the shapes do not fit.
    """
    if logits.shape[:-1] != labels.shape or (shift and labels.dim() != 2):
        raise CallError(
            f"Logits {tuple(logits.shape)} do not fit labels {tuple(labels.shape)}: expected (B, C) and (B,), or "
            "(B, S, V) and (B, S)."
        )
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    losses = cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=ignored, reduction="none")
    return losses.view(labels.shape), labels != ignored
