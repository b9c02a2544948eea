"""Rows that a pass prepends to the embedded tokens, described for programs whose examples have rows of their own."""

from __future__ import annotations

from dataclasses import dataclass

from peftgraph.sites.selectors.selector import Selector


@dataclass(frozen=True)
class PromptRows:
    """Describes rows before the tokens, which a pass has as one parameter (length, features).

    Attributes:
        at: the embeddings.
        length: the number of rows.
        start: how many tokens stay before them.
        trim_results: whether the model's results are those of the tokens alone.
    """

    at: Selector
    length: int
    start: int
    trim_results: bool
