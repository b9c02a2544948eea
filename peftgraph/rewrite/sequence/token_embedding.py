"""The embedding of the tokens among all table lookups, and what the model's inputs are to its tokens."""

from __future__ import annotations

import torch
from torch import fx

from peftgraph.errors import PeftGraphError, RecipeError
from peftgraph.ir.builder import Builder
from peftgraph.ir.modes import SEQUENCE_AXIS
from peftgraph.rewrite.match import Match
from peftgraph.rewrite.sequence.axes import same_size
from peftgraph.rewrite.sequence.token_inputs import TokenInputs, find_token_inputs, of_tokens
from peftgraph.sites import attention, block, embedding, kind
from peftgraph.sites.dataflow import ops
from peftgraph.sites.ports import input_port
from peftgraph.sites.selectors.selector import Selector

aten = torch.ops.aten


def is_token_embedding(m: Match, at: Selector | None = None) -> bool:
    """Tell whether an embedding looks up tokens: no positions, and no larger table is looked up along the same
    sequence.

    Args:
        m: a match of an `embedding`.
        at: the sites among which the pass may choose; all embeddings by default.

    Raises:
        RecipeError: other tables at `at` are as large.
    """
    if not _looks_up_table(m):
        return False
    name = _index_input(m)
    if name is None:  # computed from inputs, as a decoder's tokens are from labels
        return True
    index = m.now(m.names[name]).meta["val"]
    if index.dim() < 2:
        return True
    inputs = find_token_inputs(m, index.shape[1])
    sizes = [rows for other, rows in inputs.tables if other not in inputs.positions]
    if name in inputs.positions or m.shape[1] < max(sizes, default=0):
        return False
    others = m.related(embedding if at is None else at)
    tables = [one for one in others if _looks_up_table(one) and _index_input(one) in set(inputs.along)]
    equal = [one for one in tables if one.shape[1] == m.shape[1] and not one.shares_weight(m)]
    if equal and any(one.site.id == m.site.id for one in others):
        raise RecipeError(
            f"{' and '.join(sorted({m.site.id, *(one.site.id for one in equal)}))} embed one sequence of tokens, from "
            f"tables of {m.shape[1]} rows each, so it is not known which one is that of the tokens; choose one of them "
            "with at=."
        )
    return True


def embeds_input_tokens(m: Match, at: Selector | None = None) -> bool:
    """Tell whether a site is the embedding of tokens (batch, tokens) that are an input of the model, and of any
    length."""
    shape = m.output.meta["val"].shape if m.site.role == "embedding" and m.has("output") else ()
    if len(shape) != 3 or isinstance(shape[1], int):
        return False
    return _index_input(m) in find_token_inputs(m, shape[1]).along and is_token_embedding(m, at)


def _looks_up_table(m: Match) -> bool:
    return m.site.role == "embedding" and m.names[m.site.op].target is aten.embedding.default


def _index_input(m: Match) -> str | None:
    """Return the input whose numbers an embedding looks up, up to their layout; None where they are computed."""
    names = {node.name for node in m.inputs}
    source = m.value("input")
    while m.edits.base_value(source.name) not in names:
        if source.op != "call_function" or ops.name(source) not in ops.LAYOUT | ops.CAST:
            return None
        source = source.all_input_nodes[0]
    return m.edits.base_value(source.name)


def token_inputs_of(m: Match) -> TokenInputs:
    """Return the inputs that run along the tokens that a table lookup embeds.

    Raises:
        PeftGraphError: it embeds no tokens, the length is fixed, or an input runs along it in a form that rows do not
            fit in.
    """
    shape = m.output.meta["val"].shape if m.has("output") else ()
    sizes = " x ".join(map(str, shape))
    if m.site.role != "embedding" or len(shape) != 3:
        raise PeftGraphError(
            f"{m.site.id} is no embedding of tokens (batch, tokens) but gives {sizes}; choose the one with at=."
        )
    if isinstance(shape[1], int):
        raise PeftGraphError(f"{m.site.id} gives {sizes}: the model's own code fixes how many tokens there are.")
    keys = cached_keys(m)
    inputs = find_token_inputs(m, shape[1], None if keys is None else shape[1] + keys.meta["val"].shape[SEQUENCE_AXIS])
    for name in (*inputs.along, *inputs.whole):
        of_tokens(m, name)
    return inputs


def cached_keys(m: Match) -> fx.Node | None:
    """Return the input that holds keys of earlier calls, where the attention over the embedded tokens continues any.

    Raises:
        PeftGraphError: it does, and no such input does.
    """
    length = m.names[m.port("output")].meta["val"].shape[1]
    for core in m.related(attention.core & kind("self")):
        if "q" not in core.site.axes or "k" not in core.site.axes:
            continue
        queries, keys = (
            m.names[core.port(port)].meta["val"].shape[core.site.axes[port].positions] for port in ("q", "k")
        )
        if not same_size(queries, length) or same_size(keys, queries):
            continue
        for node in m.inputs:
            shape = node.meta["val"].shape
            if len(shape) == 4 and same_size(shape[SEQUENCE_AXIS], keys - queries):
                return node
        raise PeftGraphError(
            f"{core.site.id} reads {keys} keys for {queries} queries, and no input holds the others, so it is not "
            "known whether rows precede them already. Trace the model without a cache."
        )
    return None


def embedding_output_port(m: Match) -> str:
    """Return the port of the finished embeddings: of what the first block reads of the embedded tokens, in their own
    width.

    Args:
        m: the embedding of the tokens.

    Raises:
        PeftGraphError: no block reads them.
    """
    return input_port(m.edits.base_value(embedding_output(m).name))


def embedding_output(m: Match) -> fx.Node:
    """Return what the first block reads of the embedded tokens, before it is taken to another width.

    Raises:
        PeftGraphError: no block reads them.
    """
    inputs = [one.input for one in m.related(block)]
    reading = [x for x in inputs if m.output in Builder.nodes_from_inputs(x) | {x}]
    if not reading:
        raise PeftGraphError(f"No block reads what {m.site.id} embeds; choose the embedding of the tokens with at=.")
    value = min(reading, key=lambda x: x.meta["order"])
    width, way = m.output.meta["val"].shape[-1], {m.output, *Builder.nodes_between(m.output, value)}
    while value.meta["val"].shape[-1] != width:
        value = next(one for one in value.all_input_nodes if one in way)
    return value
