"""What the quickstart trains: a classifier of sentences around an encoder, and the frozen baseline it must beat.

Shapes: B sentences, S tokens, D features, C classes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]
EVALUATION_BATCH = 64
DECAYS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


class Classifier(nn.Module):
    """An encoder, the mean over the tokens of its last hidden state, and a linear head."""

    def __init__(self, encoder: nn.Module, head: nn.Linear, dropout: float = 0.0) -> None:
        super().__init__()
        self.encoder, self.head, self.dropout = encoder, head, dropout

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The scores, (B, C)."""
        return self.classify(self.embed(input_ids, attention_mask))

    def classify(self, embeddings_BD: Tensor) -> Tensor:
        """The scores of embeddings, (B, C)."""
        return self.head(nn.functional.dropout(embeddings_BD, self.dropout, self.training))

    def embed(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The sentence's embedding, (B, D)."""
        hidden_BSD = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask_BS1 = attention_mask.unsqueeze(-1).to(hidden_BSD.dtype)
        return (hidden_BSD * mask_BS1).sum(1) / mask_BS1.sum(1)


@dataclass(frozen=True)
class Encoded:
    """A part of the corpus as token ids and labels."""

    ids: Sequence[Sequence[int]]
    labels_N: Tensor

    def batch(self, rows: Sequence[int]) -> Batch:
        """Some sentences, padded on the right to the longest of them."""
        longest = max(len(self.ids[row]) for row in rows)
        ids_BS = torch.zeros(len(rows), longest, dtype=torch.long)
        mask_BS = torch.zeros_like(ids_BS)
        for place, row in enumerate(rows):
            ids_BS[place, : len(self.ids[row])] = torch.tensor(self.ids[row])
            mask_BS[place, : len(self.ids[row])] = 1
        return {"input_ids": ids_BS, "attention_mask": mask_BS}

    def chunks(self) -> Iterator[list[int]]:
        """All rows, sentences of similar length together."""
        order = sorted(range(len(self.ids)), key=lambda row: len(self.ids[row]))
        for start in range(0, len(order), EVALUATION_BATCH):
            yield order[start : start + EVALUATION_BATCH]


def per_sentence(
    part: Encoded, function: Callable[[Batch], Tensor], tick: Callable[[int], None] = lambda rows: None
) -> Tensor:
    """`function` of every sentence of a part, in the part's order."""
    results: list[Tensor | None] = [None] * len(part.ids)
    with torch.no_grad():
        for rows in part.chunks():
            for row, value in zip(rows, function(part.batch(rows)), strict=True):
                results[row] = value
            tick(len(rows))
    return torch.stack([value for value in results if value is not None])


def accuracy(scores_NC: Tensor, labels_N: Tensor) -> float:
    """The share of rows whose largest score is the label's."""
    return float((scores_NC.argmax(-1) == labels_N).float().mean())


@dataclass(frozen=True)
class Baseline:
    """The best linear head on frozen embeddings; `decay` was chosen on the validation part."""

    head: nn.Linear
    decay: float
    validation: float


def frozen_baseline(embeddings: Mapping[str, Tensor], labels: Mapping[str, Tensor], classes: int) -> Baseline:
    """Fits the head to convergence for every weight decay and keeps the one that validates best.

    Features are standardised for fitting, which makes one decay mean the same for all; the head that comes back has
    that
    folded in, so it takes plain embeddings.
    """
    mean_D, deviation_D = embeddings["train"].mean(0), embeddings["train"].std(0).clamp_min(1e-6)
    best: Baseline | None = None
    for decay in DECAYS:
        head = _fit((embeddings["train"] - mean_D) / deviation_D, labels["train"], classes, decay)
        with torch.no_grad():
            head.weight.div_(deviation_D)
            head.bias.sub_(head.weight @ mean_D)
            found = accuracy(head(embeddings["validation"]), labels["validation"])
        if best is None or found > best.validation:
            best = Baseline(head, decay, found)
    assert best is not None
    return best


def _fit(x_ND: Tensor, labels_N: Tensor, classes: int, decay: float) -> nn.Linear:
    head = nn.Linear(x_ND.shape[1], classes)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimiser = torch.optim.LBFGS(head.parameters(), max_iter=500, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(head(x_ND), labels_N) + decay * head.weight.square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    return head


@dataclass(frozen=True)
class Schedule:
    """How the classifier trains.

    Attributes:
        steps: optimiser steps.
        rate: the peak learning rate of the adapter, after a linear warm-up over a tenth of the steps; linear decay
            after it.
        head_rate: the same for the head.
        dropout: on the sentence's embedding.
        smoothing: of the labels.
        contrast: the weight of the contrastive loss, which pulls sentences of one family together in embedding space.
        temperature: of the contrastive loss.
        share: how much of the way from their start the weights keep in the end. Less than all of it holds better on
            modules that training never saw (Wortsman et al., 2022).
        checks: how often the validation part is looked at.
    """

    steps: int = 120
    batch: int = 32
    rate: float = 3e-3
    head_rate: float = 1e-3
    decay: float = 0.01
    dropout: float = 0.2
    smoothing: float = 0.1
    contrast: float = 1.0
    temperature: float = 0.2
    share: float = 0.6
    checks: int = 5


@dataclass
class Curve:
    """What was seen while training: (step, loss) at every step, (step, validation accuracy) at every look."""

    losses: list[tuple[int, float]] = field(default_factory=list)
    validations: list[tuple[int, float]] = field(default_factory=list)


def train(
    net: Classifier,
    parts: Mapping[str, Encoded],
    schedule: Schedule,
    seed: int,
    tick: Callable[[Curve], None] = lambda curve: None,
) -> Curve:
    """Trains what requires grad, for all the steps; the validation part is watched, and nothing is chosen by it.

    The last look at the validation part is after the weights went back by 1 - `share`.
    """
    curve = Curve()
    parameters = [p for p in net.parameters() if p.requires_grad]
    optimiser, scheduler = _optimiser(net, schedule)
    start = [p.detach().clone() for p in parameters]
    curve.validations.append((0, evaluate(net, parts["validation"])))
    looks = {round(schedule.steps * (i + 1) / schedule.checks) for i in range(schedule.checks)}
    batches = _batches(parts["train"], schedule.batch, seed)
    for step in range(1, schedule.steps + 1):
        rows = next(batches)
        net.train()
        loss = _loss(net, parts["train"].batch(rows), parts["train"].labels_N[rows], schedule)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        scheduler.step()
        curve.losses.append((step, float(loss.detach())))
        if step in looks:
            curve.validations.append((step, evaluate(net, parts["validation"])))
        tick(curve)
    with torch.no_grad():
        for parameter, first in zip(parameters, start, strict=True):
            parameter.copy_(first.lerp(parameter, schedule.share))
    curve.validations.append((schedule.steps, evaluate(net, parts["validation"])))
    tick(curve)
    return curve


def _loss(net: Classifier, batch: Batch, labels_B: Tensor, schedule: Schedule) -> Tensor:
    embeddings_BD = net.embed(**batch)
    loss = nn.functional.cross_entropy(net.classify(embeddings_BD), labels_B, label_smoothing=schedule.smoothing)
    if schedule.contrast:
        loss = loss + schedule.contrast * contrastive(embeddings_BD, labels_B, schedule.temperature)
    return loss


def contrastive(embeddings_BD: Tensor, labels_B: Tensor, temperature: float) -> Tensor:
    """The supervised contrastive loss (Khosla et al., 2020, equation 2): every other sentence of the batch is a guess.

    Of each sentence, the mean of -log p over the others of its family, p being a softmax over all others by cosine.
    """
    unit_BD = nn.functional.normalize(embeddings_BD, dim=-1)
    itself_BB = torch.eye(len(labels_B), dtype=torch.bool)
    scores_BB = (unit_BD @ unit_BD.T / temperature).masked_fill(itself_BB, -1e9)
    logs_BB = scores_BB - scores_BB.logsumexp(1, keepdim=True)
    friends_BB = (labels_B[:, None] == labels_B) & ~itself_BB
    count_B = friends_BB.sum(1)
    each_B = -(logs_BB * friends_BB).sum(1) / count_B.clamp_min(1)
    return each_B.sum() / (count_B > 0).sum().clamp_min(1)


def evaluate(net: Classifier, part: Encoded) -> float:
    """The accuracy on a part, in eval mode."""
    net.eval()
    return accuracy(per_sentence(part, lambda batch: net(**batch)), part.labels_N)


def _optimiser(net: Classifier, schedule: Schedule) -> tuple[torch.optim.Optimizer, Any]:
    adapter = [p for p in net.encoder.parameters() if p.requires_grad]
    groups = [
        {"params": adapter, "lr": schedule.rate},
        {"params": list(net.head.parameters()), "lr": schedule.head_rate},
    ]
    optimiser = torch.optim.AdamW(groups, weight_decay=schedule.decay)
    warm = max(1, schedule.steps // 10)

    def factor(step: int) -> float:
        return min((step + 1) / warm, (schedule.steps - step) / max(1, schedule.steps - warm))

    return optimiser, torch.optim.lr_scheduler.LambdaLR(optimiser, factor)


def _batches(part: Encoded, size: int, seed: int) -> Iterator[list[int]]:
    """Endless batches; every pass is shuffled, and within a stretch of batches similar lengths stand together."""
    rng = random.Random(seed)
    size = min(size, len(part.ids))
    while True:
        rows = list(range(len(part.ids)))
        rng.shuffle(rows)
        stretches = [
            sorted(rows[i : i + 8 * size], key=lambda row: len(part.ids[row])) for i in range(0, len(rows), 8 * size)
        ]
        batches = [stretch[i : i + size] for stretch in stretches for i in range(0, len(stretch), size)]
        rng.shuffle(batches)
        yield from (batch for batch in batches if len(batch) == size)
