"""Defines what the quickstart trains: an encoder with a linear head that points at a word, and how it is run.

Shapes: B sentences, S tokens, D features, W words (padded), N sentences of a part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peftgraph.demo.docstrings import WORDS

Batch = dict[str, Tensor]
EVALUATION_BATCH = 64
WIDEST = WORDS.stop  # words of the longest sentence


class Proofreader(nn.Module):
    """Points at a word: an encoder, and a linear head that scores the state of every word's first token."""

    def __init__(self, encoder: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, input_ids: Tensor, attention_mask: Tensor, first_BW: Tensor) -> Tensor:
        """Return the words' scores, (B, W); -inf where a sentence has no more words."""
        scores_BW = self.head(self.states(input_ids, attention_mask, first_BW)).squeeze(-1)
        return scores_BW.masked_fill(first_BW == 0, -torch.inf)

    def states(self, input_ids: Tensor, attention_mask: Tensor, first_BW: Tensor) -> Tensor:
        """Return the state of the first token of every word, (B, W, D)."""
        hidden_BSD = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return hidden_BSD.take_along_dim(first_BW.unsqueeze(-1), 1)


@dataclass(frozen=True)
class TokenisedPart:
    """A part of the data set as tokens.

    Attributes:
        ids: the tokens of each sentence.
        first: the index of the first token of each word; never 0, which is the token before the sentence.
        places_N: the index of the word with the slip.
    """

    ids: Sequence[Sequence[int]]
    first: Sequence[Sequence[int]]
    places_N: Tensor

    def inputs(self, rows: Sequence[int]) -> Batch:
        """Return some sentences as inputs of the encoder, padded on the right to the longest of them."""
        longest = max(len(self.ids[row]) for row in rows)
        ids_BS = torch.zeros(len(rows), longest, dtype=torch.long)
        mask_BS = torch.zeros_like(ids_BS)
        for place, row in enumerate(rows):
            ids_BS[place, : len(self.ids[row])] = torch.tensor(self.ids[row])
            mask_BS[place, : len(self.ids[row])] = 1
        return {"input_ids": ids_BS, "attention_mask": mask_BS}

    def batch(self, rows: Sequence[int]) -> Batch:
        """Return some sentences as inputs of the proof-reader; `first_BW` is 0 where there is no word."""
        first_BW = torch.zeros(len(rows), WIDEST, dtype=torch.long)
        for place, row in enumerate(rows):
            first_BW[place, : len(self.first[row])] = torch.tensor(self.first[row])
        return {**self.inputs(rows), "first_BW": first_BW}

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


def accuracy(scores_NW: Tensor, places_N: Tensor) -> float:
    """Return the fraction of sentences whose slip has the largest score."""
    return float((scores_NW.argmax(-1) == places_N).float().mean())
