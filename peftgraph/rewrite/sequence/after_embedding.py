"""Rows prepended to embedded tokens that have their positions, types and norm already.

The embeddings stay as they are. What reads them reads a longer sequence, and what else follows from the inputs, such as
the mask, is computed again from longer inputs for all that comes after the embeddings.
"""

from __future__ import annotations

from torch import fx

from peftgraph.errors import PeftGraphError
from peftgraph.ir.builder import Builder
from peftgraph.rewrite.match import Match
from peftgraph.rewrite.sequence.prepended_rows import PrependedRows
from peftgraph.rewrite.sequence.token_embedding import cached_keys, embedding_output, token_inputs_of
from peftgraph.rewrite.sequence.token_inputs import TokenInputs, reached
from peftgraph.sites.ports import input_port


def insert_after_embedding(m: Match, op: Builder, rows_LD: fx.Node, after: int) -> dict[str, fx.Node]:
    """Return the finished embeddings with the rows, and all else that follows from the inputs and is read after them,
    by port.

    Raises:
        PeftGraphError: the model has no first block, continues earlier calls, fixes the length, has inputs that rows
            do not fit in, or reads unfinished embeddings elsewhere.
    """
    embedded, inputs = embedding_output(m), _checked_inputs(m, op)
    before, length = op.nodes_from_inputs(embedded), embedded.meta["val"].shape[1]
    inner = before | {embedded}
    op.pinned_users |= inner
    plan = PrependedRows(m, op, int(rows_LD.meta["val"].shape[0]), after, inputs, length=length)
    ports = {input_port(name): plan.recompute(m.value(input_port(name))) for name in inputs.along}
    ports |= {input_port(name): plan.labels(name, ignored) for name, ignored in inputs.labels}
    outside = [node for node in before if node.op != "placeholder" and not inner.issuperset(node.users)]
    again = {_port(m, node): plan.recompute(node) for node in outside if plan.recompute(node) is not node}
    return ports | again | {_port(m, embedded): plan.insert(embedded, plan.for_batch(rows_LD, embedded))}


def cut_after_embedding(m: Match, op: Builder, rows: int, after: int) -> dict[str, fx.Node]:
    """Return what the model returns for each token, without what it gives for the rows, by port."""
    length = m.value(_port(m, embedding_output(m))).meta["val"].shape[1]
    return PrependedRows(m, op, rows, after).cut_results(length)


def _checked_inputs(m: Match, op: Builder) -> TokenInputs:
    inputs, site, embedded = token_inputs_of(m), m.site.id, embedding_output(m)
    if cached_keys(m) is not None:
        raise PeftGraphError(
            f"Rows after the embeddings of {site} need a model without calls before this one. Trace it without a cache."
        )
    dependents = reached([m.output]).keys()
    unfinished = op.nodes_from_inputs(embedded) & dependents
    elsewhere = dependents - unfinished - {embedded}
    read = next((node for node in unfinished if not elsewhere.isdisjoint(node.users)), None)
    if read is not None:
        raise PeftGraphError(
            f"What {site} embeds is read before it is finished, as {read.name}, where no rows are. Put them among "
            'the tokens: onto="tokens".'
        )
    return inputs


def _port(m: Match, node: fx.Node) -> str:
    return input_port(m.edits.base_value(node.name))
