"""Defines what the quickstart trains: an encoder with a linear head that classifies sentences, and how it is run.

Shapes: B sentences, S tokens, D features, C classes, N sentences of a part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]
EVALUATION_BATCH = 64


class Classifier(nn.Module):
    """Classifies sentences: an encoder, the mean of its last hidden state over the tokens, and a linear head."""

    def __init__(self, encoder: nn.Module, head: nn.Linear, dropout: float = 0.0) -> None:
        super().__init__()
        self.encoder, self.head, self.dropout = encoder, head, dropout

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the scores, (B, C)."""
        return self.classify(self.embed(input_ids, attention_mask))

    def classify(self, embeddings_BD: Tensor) -> Tensor:
        """Return the scores of embeddings, (B, C)."""
        return self.head(nn.functional.dropout(embeddings_BD, self.dropout, self.training))

    def embed(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the sentences' embeddings, (B, D)."""
        hidden_BSD = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask_BS1 = attention_mask.unsqueeze(-1).to(hidden_BSD.dtype)
        return (hidden_BSD * mask_BS1).sum(1) / mask_BS1.sum(1)


@dataclass(frozen=True)
class TokenisedPart:
    """A part of the data set as token ids and labels."""

    ids: Sequence[Sequence[int]]
    labels_N: Tensor

    def batch(self, rows: Sequence[int]) -> Batch:
        """Return some sentences as model inputs, padded on the right to the longest of them."""
        longest = max(len(self.ids[row]) for row in rows)
        ids_BS = torch.zeros(len(rows), longest, dtype=torch.long)
        mask_BS = torch.zeros_like(ids_BS)
        for place, row in enumerate(rows):
            ids_BS[place, : len(self.ids[row])] = torch.tensor(self.ids[row])
            mask_BS[place, : len(self.ids[row])] = 1
        return {"input_ids": ids_BS, "attention_mask": mask_BS}

    def chunks(self) -> Iterator[list[int]]:
        """Yield all rows in batches of sentences of similar length."""
        order = sorted(range(len(self.ids)), key=lambda row: len(self.ids[row]))
        for start in range(0, len(order), EVALUATION_BATCH):
            yield order[start : start + EVALUATION_BATCH]


def map_sentences(
    part: TokenisedPart, function: Callable[[Batch], Tensor], tick: Callable[[int], None] = lambda rows: None
) -> Tensor:
    """Apply a function of batches to all sentences of a part; return the results in the part's order.

    Args:
        part: the sentences.
        function: gives one row of results for each sentence of a batch.
        tick: called with the number of sentences of every finished batch.
    """
    results: list[Tensor | None] = [None] * len(part.ids)
    with torch.no_grad():
        for rows in part.chunks():
            for row, value in zip(rows, function(part.batch(rows)), strict=True):
                results[row] = value
            tick(len(rows))
    return torch.stack([value for value in results if value is not None])


def accuracy(scores_NC: Tensor, labels_N: Tensor) -> float:
    """Return the fraction of rows whose largest score is the label's."""
    return float((scores_NC.argmax(-1) == labels_N).float().mean())
