"""Rules for methods that add a difference to stored tensors themselves: weights, scales of norms, biases."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, fx

from peftgraph.ir.builder import Builder
from peftgraph.rewrite.joins import Add, AddProduct
from peftgraph.rewrite.match import Match
from peftgraph.rewrite.rule import Params, Rule
from peftgraph.rewrite.weight_views import ParameterValue
from peftgraph.sites.selectors.selector import Selector

BuildDifference = Callable[[Match, Builder, ParameterValue], fx.Node]
FoldDifference = Callable[[ParameterValue, Params], Tensor]


def difference_rules(
    at: Selector,
    build: BuildDifference,
    fold: FoldDifference,
    changed_values: Callable[[Params], int] | None = None,
) -> list[Rule]:
    """Make the rules of a method that computes W + g for every stored tensor of the chosen sites.

    Projections and tables change by their own part of a stored weight, norms by their scale, biases as they are stored.
    Each tensor changes once, for all who read it.

    Args:
        at: which sites.
        build: computes g in the graph, shaped like the part of the tensor that it is for.
        fold: computes W + g from the part of the tensor and the trained parameters.
        changed_values: how many entries of g are not zero; all by default.
    """

    def of_matrix(m: Match, op: Builder) -> fx.Node:
        return build(m, op, m.weight)

    def of_vector(m: Match, op: Builder) -> Mapping[str, fx.Node]:
        stored = stored_vector(m)
        return dict.fromkeys(m.ports_of_stored(stored.view.parameter), build(m, op, stored))

    def fold_matrix(m: Match, p: Params) -> Mapping[ParameterValue, Tensor]:
        return {(weight := m.weight): fold(weight, p)}

    def fold_vector(m: Match, p: Params) -> Mapping[ParameterValue, Tensor]:
        return {(stored := stored_vector(m)): fold(stored, p)}

    join, count = AddProduct(into_weight=True), changed_values
    return [
        Rule(at, of_matrix, fold_matrix, join=join, where=is_matrix, optional=True, changed_values=count),
        Rule(at, of_vector, fold_vector, join=Add(), where=is_vector, optional=True, changed_values=count),
    ]


def is_matrix(m: Match) -> bool:
    """Tell whether a site is a projection or a table, with a weight of its own."""
    return m.site.weight is not None and m.site.role not in ("bias", "norm", "ffn.hidden")


def is_vector(m: Match) -> bool:
    """Tell whether a site is a norm with a scale, or a bias."""
    return (m.site.role == "bias" and m.bias is not None) or (m.site.role == "norm" and m.scale is not None)


def stored_vector(m: Match) -> ParameterValue:
    """Return the scale of a norm, or a bias."""
    found = m.bias if m.site.role == "bias" else m.scale
    assert found is not None
    return found
