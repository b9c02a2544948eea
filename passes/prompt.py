"""Prompt tuning (Lester et al., 2021): trainable rows before the embedded tokens, with SPoT's initialisation.

    E = embed(x)   ->   E = [P; embed(x)]
    no fold: the rows are attended to, and no weight stores rows of a sequence

Masks, types, positions and labels grow with the sequence: the rows get the mask and type of the first token,
positions count on, and the rows have no loss. In a batch that is padded on the left the rows follow the padding.
Outputs for the rows are removed from the results (returns="all" keeps them). The paper's T5 has rows in its encoder
alone, so the decoder of an encoder-decoder has none by default; T-Few has them in both: at="embedding". In the
adapters library the rows are inserted after the complete embeddings, and the tokens keep their positions:
onto="embeddings". A model of images or audio embeds no tokens. There the rows are prepended to the input of the
first block, as in "shallow" visual prompt tuning (VPT): at="block" onto="embeddings", with place="after_first" after
the class token as in VPT. A reader of the first position, such as a pooler, reads the first row with place="front",
and the class token with "after_first". Masks over positions and the sizes in views grow with the sequence; position
biases, windows, and operations that arrange the positions as an image again are refused.
Shapes: L length, D features of the embedding, P (L, D). P starts uniform in [-0.5, 0.5] (the authors' code draws
from [0, 0.5): init="code"; peft takes a standard normal one, init="normal"), as the embeddings of random tokens
among the most frequent ones, which come first in the authors' vocabulary ("vocabulary"), or as those of the answers'
words, the mean over a word's tokens, and random tokens for the rest ("classes"). From the prompt of another task, as
SPoT does: `pg.prompts.start`.
Source: arXiv 2104.08691, sections 2.1 and 3.2; google-research/prompt-tuning, train/prompts.py. arXiv 2110.07904
(SPoT). arXiv 2203.12119, section 3.2 (VPT).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx

import peftgraph as pg
from peftgraph.authoring import Builder, Match, Pass, Rule, omit_default
from peftgraph.authoring.modules import init
from peftgraph.authoring.sequence import PrependTokens, PromptRows, prepend_token_rules

START_INDEX = {"front": 0, "after_first": 1}


def upper_half(rows: Tensor) -> None:
    """Uniform in [0, 0.5)."""
    rows.uniform_(0.0, 0.5)


INITIALIZERS = {"uniform": init.uniform(0.5), "code": upper_half, "normal": init.normal(1.0)}


@dataclass(frozen=True, kw_only=True)
class Prompt(Pass):
    """Rows before the tokens.

    Attributes:
        at: embeddings of tokens; or blocks: the first block of each stack without a token embedding gets rows.
        length: L.
        init: "uniform", "code", "normal", "vocabulary" or "classes".
        vocabulary: the number of first tokens to draw from.
        classes: the tokens of each answer, for init="classes".
        place: "front", or "after_first" token, for a model that reads its output at the first one.
        onto: "tokens", where the rows join the embedded tokens, or "embeddings" that already have positions and norm.
        returns: results for the "tokens", or for "all" positions, including the rows.
    """

    word = "prompt"
    at: pg.Selector = pg.embedding & ~pg.stack("decoder")
    length: int = 100
    init: Literal["uniform", "code", "normal", "vocabulary", "classes"] = "uniform"
    vocabulary: int = omit_default(5000)
    classes: tuple[tuple[int, ...], ...] = omit_default(())
    place: Literal["front", "after_first"] = omit_default("front")
    onto: Literal["tokens", "embeddings"] = omit_default("tokens")
    returns: Literal["tokens", "all"] = omit_default("tokens")

    def check(self) -> None:
        """Refuse a length below 1, unknown words, and classes that do not fit."""
        self.require(self.length >= 1, f"length must be at least 1, got {self.length}.")
        self.require_one_of("init", (*INITIALIZERS, "vocabulary", "classes"))
        self.require_one_of("place", START_INDEX)
        self.require_one_of("onto", ("tokens", "embeddings"))
        self.require_one_of("returns", ("tokens", "all"))
        self.require(self.vocabulary >= 1, f"vocabulary must be at least 1, got {self.vocabulary}.")
        fits = all(self.classes) and 0 < len(self.classes) <= self.length
        self.require(
            fits if self.init == "classes" else not self.classes,
            f'init="classes" takes the tokens of 1 to length={self.length} classes, none of them empty; got '
            f"{len(self.classes)} with init={self.init!r}.",
        )

    @property
    def plan(self) -> PrependTokens:
        """L more positions before the tokens."""
        return PrependTokens(rows=self.length, start=START_INDEX[self.place], after_embedding=self.onto == "embeddings")

    def rules(self) -> list[Rule]:
        """Make the inputs longer; prepend the rows to the embedded tokens, and cut them out of the results."""
        reason = "the rows are attended to, and no weight stores rows of a sequence"
        return prepend_token_rules(self.at, self.plan, self.prompt, reason, trim_results=self.returns == "tokens")

    def prompt_rows(self) -> PromptRows | None:
        """Return the rows, where they are among the tokens."""
        if self.plan.after_embedding:
            return None
        return PromptRows(self.at, self.length, self.plan.start, self.returns == "tokens")

    def prompt(self, m: Match, op: Builder) -> fx.Node:
        """P, (L, D)."""
        return op.param("prompt", (self.length, m.features), INITIALIZERS.get(self.init) or self.from_table(m))

    def from_table(self, m: Match) -> Callable[[Tensor], None]:
        """P from rows of the embedding."""
        tokens = [token for word in self.classes for token in word]
        self.require(
            m.site.weight is not None,
            f'{m.site.id} has no table to take init="{self.init}" from; choose "uniform", "code" or "normal".',
        )
        size = m.shape[1]
        self.require(all(0 <= token < size for token in tokens), f"a token of classes is not in 0 to {size - 1}.")

        def fill(rows: Tensor) -> None:
            table_VD = m.weight.value.mT
            drawn = torch.randperm(min(self.vocabulary, size))[torch.arange(self.length) % min(self.vocabulary, size)]
            rows.copy_(table_VD[drawn.to(table_VD.device)])
            for row, word in zip(rows, self.classes, strict=False):
                row.copy_(table_VD[list(word)].mean(0))

        return fill
