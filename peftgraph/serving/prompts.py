"""Prompts of adapters: rows before the tokens of each example, as many as its adapter has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from peftgraph.errors import Conflict
from peftgraph.ir.builder import Builder
from peftgraph.ir.tensor_table import TensorEntry
from peftgraph.rewrite.match import Match
from peftgraph.rewrite.method import Pass
from peftgraph.rewrite.prompt_rows import PromptRows
from peftgraph.rewrite.rule import Rule
from peftgraph.rewrite.sequence.prepend_tokens import PrependTokens, RowsByExample, rows_by_example_rules

VALUES, LENGTHS = "peftgraph_prompts.rows", "peftgraph_prompts.lengths"


@dataclass(frozen=True)
class AdapterPrompt:
    """The prompt of one adapter.

    Attributes:
        rows: where it stands.
        method: the pass, for messages.
        values: (length, features).
    """

    rows: PromptRows
    method: str
    values: Tensor


class PromptTable:
    """The prompts of all adapters, by number: entry 0, and that of an adapter without one, has no rows.

    Attributes:
        rows: where they stand; their length is that of the longest.
        values: (1 + capacity, L, D).
        lengths: (1 + capacity,).
    """

    def __init__(self, prompts: Mapping[int, AdapterPrompt], capacity: int) -> None:
        first = next(iter(prompts.values()))
        for one in prompts.values():
            check_same_place(one, first)
        length = max(one.rows.length for one in prompts.values())
        self.rows = PromptRows(first.rows.at, length, first.rows.start, first.rows.trim_results)
        self.first = first
        self.values = first.values.new_zeros((capacity + 1, length, first.values.shape[-1]))
        self.lengths = torch.zeros(capacity + 1, dtype=torch.int64, device=first.values.device)
        for number, one in prompts.items():
            write_prompt(self.values, self.lengths, number, one)

    def entries(self) -> dict[str, TensorEntry]:
        """Return the tables as stored tensors of a program."""
        return {
            VALUES: TensorEntry(self.values, "buffer", added=True),
            LENGTHS: TensorEntry(self.lengths, "buffer", added=True, keeps_dtype=True),
        }

    def takes(self, prompt: AdapterPrompt | None) -> bool:
        """Tell whether there is room for another prompt."""
        if prompt is None:
            return True
        wanted, here = prompt.rows, self.rows
        same = (str(wanted.at), wanted.start, wanted.trim_results) == (str(here.at), here.start, here.trim_results)
        return same and wanted.length <= here.length

    def method(self, ids: str) -> Pass:
        """Return the pass that prepends the rows.

        Args:
            ids: the name of the input that has each example's adapter.
        """
        return PromptsByRow(self, ids)


def check_same_place(one: AdapterPrompt, other: AdapterPrompt) -> None:
    """Refuse prompts that stand in different places.

    Raises:
        Conflict: they do.
    """
    places = [(str(p.rows.at), p.rows.start, p.rows.trim_results) for p in (one, other)]
    if places[0] != places[1]:
        raise Conflict(f"{one.method} and {other.method} put rows in different places; one graph has one of them.")


def write_prompt(values: Tensor, lengths: Tensor, number: int, prompt: AdapterPrompt | None) -> None:
    """Write the prompt of an adapter into tables, in place; None for no rows."""
    with torch.no_grad():
        lengths[number] = 0 if prompt is None else prompt.rows.length
        if prompt is not None:
            values[number, : prompt.rows.length] = prompt.values


class PromptsByRow(Pass):
    """Rows before the tokens of each example, of the adapter that it names."""

    word = "prompts_by_row"

    def __init__(self, table: PromptTable, ids: str) -> None:
        object.__setattr__(self, "name", "")
        object.__setattr__(self, "_table", table)
        object.__setattr__(self, "_ids", ids)

    def rules(self) -> list[Rule]:
        """Return the rules of prompts, with rows by example."""
        table: PromptTable = vars(self)["_table"]
        place = PrependTokens(rows=table.rows.length, start=table.rows.start)
        rows = RowsByExample(self.values, self.example, self.lengths)
        reason = "the rows are attended to"
        return rows_by_example_rules(table.rows.at, place, rows, reason, trim_results=table.rows.trim_results)

    def values(self, m: Match, op: Builder) -> fx.Node:
        """Return the rows of all adapters, (M, L, D)."""
        return op.stored_tensor(VALUES, vars(self)["_table"].values)

    def example(self, m: Match, op: Builder) -> fx.Node:
        """Return each example's adapter, (B,)."""
        return m.names[vars(self)["_ids"]]

    def lengths(self, m: Match, op: Builder) -> fx.Node:
        """Return how many rows each example has, (B, 1)."""
        lengths = op.stored_tensor(LENGTHS, vars(self)["_table"].lengths)
        own = op.call(torch.ops.aten.index_select.default, lengths, 0, self.example(m, op))
        return op.call(torch.ops.aten.unsqueeze.default, own, 1)

    def __str__(self) -> str:
        return f"prompts_by_row{{length={vars(self)['_table'].rows.length}}}"
