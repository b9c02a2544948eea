"""The losses of T-Few against plain loops over inputs, choices and tokens."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import peftgraph as pg
from peftgraph import losses

B, C, T, V = 3, 4, 5, 11
LENGTHS = [[1, 5, 3, 2], [4, 4, 1, 5], [2, 3, 5, 1]]
CORRECT = [1, 0, 3]


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(B, C, T, V, generator=generator, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(0, V, (B, C, T), generator=generator)
    mask = torch.arange(T) < torch.tensor(LENGTHS).unsqueeze(-1)
    return logits, tokens, mask, torch.tensor(CORRECT)


def probability(logits: Tensor, tokens: Tensor, b: int, c: int, t: int) -> Tensor:
    exponents = [logits[b, c, t, v].exp() for v in range(V)]
    return exponents[int(tokens[b, c, t])] / torch.stack(exponents).sum()


def beta(logits: Tensor, tokens: Tensor, b: int, c: int, power: float = 1.0) -> Tensor:
    length = LENGTHS[b][c]
    return torch.stack([probability(logits, tokens, b, c, t).log() for t in range(length)]).sum() / length**power


def agree(ours: Tensor, theirs: Tensor, logits: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    mine, other = (torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (ours, theirs))
    torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-14)


def test_language_modelling(batch) -> None:
    logits, tokens, *_ = batch
    logs = [probability(logits, tokens, b, c, t).log() for b, c in enumerate(CORRECT) for t in range(LENGTHS[b][c])]
    assert len(logs) == 5 + 4 + 1
    agree(losses.language_modelling(*batch), -torch.stack(logs).sum() / 10, logits)


WRONG = [(b, c) for b in range(B) for c in range(C) if c != CORRECT[b]]


def test_unlikelihood_as_in_the_paper(batch) -> None:
    logits, tokens, *_ = batch
    costs = [-(1 - probability(logits, tokens, b, c, t)).log() for b, c in WRONG for t in range(LENGTHS[b][c])]
    assert len(costs) == 6 + 10 + 10
    agree(losses.unlikelihood(*batch), torch.stack(costs).sum() / 26, logits)


def test_unlikelihood_as_in_the_authors_code(batch) -> None:
    logits, tokens, *_ = batch
    total: list[Tensor] = []
    for b, c, t in ((b, c, t) for b in range(B) for c in range(C) for t in range(T)):
        kept = (b, c) in WRONG and t < LENGTHS[b][c]
        log = probability(logits, tokens, b, c, t).log() if kept else torch.tensor(-100.0, dtype=torch.float64)
        total.append(-(1 - log.exp() + 1e-2).log())
    theirs = torch.stack(total).sum() / 26
    agree(losses.unlikelihood(*batch, epsilon=1e-2, masked_terms=True), theirs, logits)
    silent = B * C * T - 26
    difference = losses.unlikelihood(*batch, epsilon=1e-2) - theirs
    assert float(difference.detach()) == pytest.approx(silent * math.log(1.01) / 26, rel=1e-9)


@pytest.mark.parametrize("power", [1.0, 0.0, 0.5])
def test_length_normalised(batch, power: float) -> None:
    logits, tokens, *_ = batch
    costs = []
    for b, right in enumerate(CORRECT):
        scores = [beta(logits, tokens, b, c, power) for c in range(C)]
        costs.append(torch.stack([score.exp() for score in scores]).sum().log() - scores[right])
    agree(losses.length_normalised(*batch, power=power), torch.stack(costs).mean(), logits)


def test_the_sum(batch) -> None:
    parts = [losses.language_modelling(*batch), losses.unlikelihood(*batch), losses.length_normalised(*batch)]
    agree(losses.t_few(*batch), torch.stack(parts).sum(), batch[0])


def test_rank_classification(batch) -> None:
    logits, tokens, mask, _ = batch
    scores = losses.choice_scores(logits, tokens, mask)
    best = [max(range(C), key=lambda c: float(beta(logits, tokens, b, c).detach())) for b in range(B)]
    assert scores.argmax(-1).tolist() == best


def test_padding_has_no_say(batch) -> None:
    logits, tokens, mask, correct = batch
    other = tokens.masked_fill(~mask, 3)
    noisy = logits + 7.0 * (~mask).unsqueeze(-1) * torch.randn(V, dtype=torch.float64)
    assert not torch.equal(tokens, other)
    torch.testing.assert_close(losses.t_few(noisy, other, mask, correct), losses.t_few(*batch), rtol=1e-12, atol=0)


def test_what_does_not_fit_is_refused(batch) -> None:
    logits, tokens, mask, correct = batch
    with pytest.raises(pg.CallError, match=r"Expected logits \(B, C, T, V\) and tokens \(B, C, T\), got \(3, 4, 5\)"):
        losses.language_modelling(logits[..., 0], tokens, mask, correct)
    with pytest.raises(pg.CallError, match="A choice has no token"):
        losses.choice_scores(logits, tokens, mask & (torch.arange(C) > 0).unsqueeze(-1))
    with pytest.raises(pg.CallError, match=r"Expected a mask \(3, 4, 5\), got \(3, 4\)"):
        losses.choice_scores(logits, tokens, mask[..., 0])
    with pytest.raises(pg.CallError, match="There is no wrong token"):
        losses.unlikelihood(logits[:, :1], tokens[:, :1], mask[:, :1], torch.zeros(B, dtype=torch.long))


def test_adapters_in_one_batch_have_means_of_their_own() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(5, 4, V, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, V, (5, 4), generator=generator)
    labels[0, 1] = labels[2, 3] = -100
    ids = torch.tensor([2, 0, 1, 2, 1])
    for shift in (False, True):
        values, mask = losses.label_losses(logits, labels, shift)
        found = losses.adapter_means(values, ids, 3, mask)
        for number in (1, 2):
            own, wanted = logits[ids == number], labels[ids == number]
            own, wanted = (own[:, :-1], wanted[:, 1:]) if shift else (own, wanted)
            alone = torch.nn.functional.cross_entropy(own.flatten(0, 1), wanted.flatten())
            assert abs(found[number - 1] - alone) < 1e-12
        assert found[2] == 0
    sums, numbers = losses.adapter_sums(torch.arange(5.0), ids, 2)
    assert (sums.tolist(), numbers.tolist()) == ([6.0, 3.0], [2, 2])
    with pytest.raises(pg.CallError, match="the adapters of B rows"):
        losses.adapter_means(torch.zeros(4), ids, 3)
    with pytest.raises(pg.CallError, match="do not fit labels"):
        losses.label_losses(logits, labels[:, :2])
