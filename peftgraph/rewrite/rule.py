"""Rule(site, delta, join, fold): the four things that define a method.

`delta` builds the new computation, `join` says how it is combined with the existing value, `fold` says how it goes back
into the weights, or why it cannot. The four are independent: a gate may scale any delta, and any delta may be used with
any join that fits its shape.
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
from peftgraph.sites.selectors.selector import Selector, as_selector


class Params(Mapping[str, Tensor]):
    """The trained parameters of one edit, under the short names that `delta` gave them: `p.lora_A`, in fold
    precision."""

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
    """A rewrite that is applied at every site that `at` selects.

    Attributes:
        at: the sites; also the text of a selector.
        delta: builds the new computation: a node, or a mapping from ports to nodes for several ports of one site. None
            if the site's own parameters train and nothing new is computed; see `train_parameters`.
        fold: returns the new values, keyed by the parameter values that they replace, from the current ones and the
            trained parameters; or a text, the reason why no weight can express the change.
        join: how the delta is combined with the existing values.
        max_rank: the largest rank of the change of a weight, if the method bounds it; where training decides it, a
            function of the parameters at the site and of those at all sites of the rule.
        changed_values: counts the values of the weight that differ, for a change that keeps most of them.
        bias_only: without a delta, whether only the bias of a site's own parameters trains.
        check: raises an error if the rule cannot be applied to these sites together.
        where: keeps the matches for which it returns true.
        where_message: follows "none of the N sites at ..." in the error if `where` keeps no site.
        optional: whether the rule may have no site, as long as another rule of the pass has one.
        satisfied: whether the base already is, at a match, what the rule would make of it: nothing is done there.
        gate_input: builds the input of a gate on this rule; by default that is the site's input.
        row_axes: for a fold that computes each row of the new weight, and each entry of the new bias, from the old one
            and the same row of some parameters: returns these parameters by short name, each with its axis of output
            features, counted from the end. The fold is then computed chunk by chunk.
        table_rows: for a rule that changes only some rows of the table that its sites read: their numbers. All readers
            of the table, under any tied name, are sites of the pass, so that they fold together and the tie stays.
        training_only: whether the edit changes nothing in evaluation, so that folding removes it.
        nesting: the nesting level of the edit; by default that of the site's role.
    """

    at: Selector
    delta: BuildDelta | None
    fold: Fold | str
    join: Join = field(default_factory=Add)
    max_rank: int | Callable[[Params, Sequence[Params]], int] | None = None
    changed_values: Callable[[Params], int] | None = None
    bias_only: bool = False
    check: Callable[[Sequence[Site]], None] | None = None
    where: Callable[[Match], bool] | None = None
    where_message: str = "meets the condition of the rule"
    optional: bool = False
    satisfied: Callable[[Match], bool] | None = None
    gate_input: Callable[[Match, Builder], fx.Node] | None = None
    row_axes: Callable[[Match], Mapping[str, int]] | None = None
    table_rows: Sequence[int] | None = None
    nesting: Nesting | None = None
    training_only: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "at", as_selector(self.at))


def trained(m: Match, p: Params) -> Mapping[ParameterValue, Tensor]:
    """Fold parameters that train in place: their values already are the new weights."""
    return {}


def train_parameters(
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
