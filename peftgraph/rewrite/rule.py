"""Rule(site, delta, join, fold): the four things that define a method.

`delta` builds the new computation, `join` says how it is combined with what is there, `fold` says how it goes back into
the weights, or why it cannot. The four are independent: a gate may multiply any delta, and any delta may enter by any
join that fits its shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, fx

from peftgraph.ir.builder import Builder
from peftgraph.rewrite.joins import Add, Delta, Join
from peftgraph.rewrite.match import Match
from peftgraph.rewrite.nesting import Nesting
from peftgraph.rewrite.weight_views import ParameterValue
from peftgraph.sites import Site
from peftgraph.sites.selectors.selector import Selector


class Params(Mapping[str, Tensor]):
    """The trained parameters of one edit, by the short name that `delta` gave them: `p.lora_A`, in fold precision."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self._tensors[name]
        except KeyError:
            raise AttributeError(name) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


BuildDelta = Callable[[Match, Builder], Delta]
Fold = Callable[[Match, Params], Mapping[ParameterValue, Tensor]]


@dataclass(frozen=True)
class Rule:
    """One rewrite, at every site that `at` selects.

    Attributes:
        at: where.
        delta: builds the new computation: a node, or a mapping from ports to nodes to enter at several ports of one
            site. None when the site's own parameters train and nothing new is computed; see `Train`.
        fold: computes the new values by the parameters they replace, from the current ones and the trained parameters;
            or the reason why no weight can hold the change.
        join: how the delta is combined with the values that are there.
        max_rank: the largest rank of the change of a weight, when the method bounds it.
        bias_only: whether of a site's own parameters only its bias trains, when there is no delta.
        check: raises an error where the rule cannot be put on these sites together.
        where: keeps the matches for which it returns true.
        where_message: follows "none of the N sites at ..." in the error that is raised when `where` keeps none.
        optional: whether no site at all is fine, as long as another rule of the pass has one.
        gate_input: builds what a gate on this rule reads; by default the gate reads the site's input.
        row_axes: for a fold that makes each row of the new weight, and each entry of the new bias, from the old one and
            that row of some parameters: returns these parameters by short name, each with its axis of output features,
            counted from the end. The fold is then computed a part at a time.
        table_rows: for a rule that changes only some rows of the table that its sites read: their numbers. All readers
            of the table, by any name that is tied to it, are sites of the pass, so that they fold together and the tie
            stays.
        training_only: whether the edit changes nothing in evaluation, so that folding takes it out.
        nesting: how deep the edit is nested; by default the level of the site's role.
    """

    at: Selector
    delta: BuildDelta | None
    fold: Fold | str
    join: Join = field(default_factory=Add)
    max_rank: int | None = None
    bias_only: bool = False
    check: Callable[[Sequence[Site]], None] | None = None
    where: Callable[[Match], bool] | None = None
    where_message: str = "meets the condition of the rule"
    optional: bool = False
    gate_input: Callable[[Match, Builder], fx.Node] | None = None
    row_axes: Callable[[Match], Mapping[str, int]] | None = None
    table_rows: Sequence[int] | None = None
    nesting: Nesting | None = None
    training_only: bool = False


def trained(m: Match, p: Params) -> Mapping[ParameterValue, Tensor]:
    """Fold parameters that train in place: their values already are the new weights."""
    return {}


def Train(
    at: Selector, bias_only: bool = False, where: Callable[[Match], bool] | None = None, optional: bool = False
) -> Rule:
    """Make a rule that trains the sites' own parameters, or only their biases, and computes nothing new.

    A stored tensor trains as a whole: of a fused projection's bias, all parts.
    """
    rule = Rule(at=at, delta=None, fold=trained, bias_only=bias_only, where=where, optional=optional)
    return replace(rule, where=where or _has_bias, where_message=NO_BIAS) if bias_only else rule


NO_BIAS = "has a bias. Choose others; bitfit{zero=true} adds biases"


def _has_bias(m: Match) -> bool:
    return m.site.bias is not None
