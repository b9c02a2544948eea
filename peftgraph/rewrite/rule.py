"""Rule(site, delta, join, fold): the four things that define a method.

`delta` builds the new computation, `join` says how it enters, `fold` says how it goes back into the weights, or why it
cannot. The four are independent: a gate may multiply any delta, and any delta may enter by any join that fits its
shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, fx

from peftgraph.ir.builder import Builder
from peftgraph.rewrite.match import Match, Own
from peftgraph.rewrite.views import Bound
from peftgraph.sites import Site
from peftgraph.sites.select import Selector


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

    def __iter__(self):
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


Delta = Callable[[Match, Builder], "fx.Node | Mapping[str, fx.Node]"]
Fold = Callable[[Match, Params], Mapping[Bound, Tensor]]


class Join(Protocol):
    """How a new value enters at a port."""

    @property
    def port(self) -> str:
        """Where the delta enters when it is a single value."""
        ...

    def enter(self, m: Match, op: Builder, value: fx.Node, delta: fx.Node) -> fx.Node:
        """The value that the port's users get instead of `value`."""
        ...


@dataclass(frozen=True)
class Add:
    """y -> y + delta, on the site's own columns."""

    port: str = "output"

    def enter(self, m: Match, op: Builder, value: fx.Node, delta: fx.Node) -> fx.Node:
        """y + delta."""
        return m.on_columns(op, value, lambda part: op.add(part, delta))


@dataclass(frozen=True)
class Multiply:
    """y -> y * delta, on the site's own columns."""

    port: str = "output"

    def enter(self, m: Match, op: Builder, value: fx.Node, delta: fx.Node) -> fx.Node:
        """y * delta."""
        return m.on_columns(op, value, lambda part: op.mul(part, delta))


@dataclass(frozen=True)
class Replace:
    """y -> delta."""

    port: str = "output"

    def enter(self, m: Match, op: Builder, value: fx.Node, delta: fx.Node) -> fx.Node:
        """delta itself."""
        return delta


@dataclass(frozen=True)
class Rule:
    """One rewrite, at every site that `at` selects.

    Attributes:
        at: where.
        delta: builds the new computation; None when the site's own parameters train and nothing is computed anew. A
            mapping from port to node joins at several ports of one site.
        join: how the delta enters.
        fold: the new weights by window, from the current ones and the trained parameters; or the reason why there are
            none.
        rank: the largest rank of the change of a weight, when the method bounds it.
        own: which of a site's own parameters train when there is no delta.
        where: keeps the sites for which it holds.
        optional: whether no site at all is fine, as long as another rule of the pass has one.
    """

    at: Selector
    delta: Delta | None
    fold: Fold | str
    join: Join = field(default_factory=Add)
    rank: int | None = None
    own: Own = "all"
    where: Callable[[Site], bool] | None = None
    optional: bool = False


def trained(m: Match, p: Params) -> Mapping[Bound, Tensor]:
    """The fold of parameters that train in place: they are the new weights already."""
    return {}


def Train(at: Selector, own: Own = "all", where: Callable[[Site], bool] | None = None, optional: bool = False) -> Rule:
    """A rule that makes the sites' own parameters trainable, or their biases, and computes nothing new.

    A stored tensor trains whole: of a fused projection's bias, all that is stored.
    """
    if own == "bias" and where is None:
        where = _has_bias
    return Rule(at=at, delta=None, fold=trained, own=own, where=where, optional=optional)


def _has_bias(site: Site) -> bool:
    return site.bias is not None
