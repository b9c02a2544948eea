"""Evaluation graphs for latency: the fewest calls for each token. What they compute is equal up to rounding."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from peftgraph.ir.dead_code import bypass_full_slices
from peftgraph.ir.graphs import copy_graph
from peftgraph.optimise.affine_values import join_affine_values
from peftgraph.optimise.attention_heads import group_queries, rotate_halves
from peftgraph.optimise.equal_slices import join_equal_slices
from peftgraph.optimise.functional import make_functional
from peftgraph.optimise.identities import remove_identities
from peftgraph.optimise.sibling_products import join_siblings, scale_weights
from peftgraph.optimise.stages import StagedGraph, cut_into_stages, read_input_sizes, stored_first

REWRITES: tuple[Callable[[fx.Graph], None], ...] = (
    bypass_full_slices,
    read_input_sizes,
    remove_identities,
    join_affine_values,
    join_siblings,
    scale_weights,
    join_equal_slices,
    group_queries,
    rotate_halves,
    remove_identities,
    stored_first,
)


def make_inference_graph(graph: fx.Graph) -> StagedGraph:
    """Return a graph in evaluation mode as its parts; `graph` is unchanged.

    Raises:
        NotImplementedError: the graph writes into a value in a way that has no other form.
    """
    new = copy_graph(graph)
    make_functional(new)
    for rewrite in REWRITES:
        rewrite(new)
    new.lint()
    return cut_into_stages(new)
