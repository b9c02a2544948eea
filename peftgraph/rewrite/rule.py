"""Rule(site, delta, join, fold): the four things that define a method.

`delta` builds the new computation, `join` says how it enters, `fold` says how it goes back into the weights, or why it
cannot. The four are independent: a gate may multiply any delta, and any delta may enter by any join that fits its
shape.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, fx

from peftgraph.errors import PeftGraphError
from peftgraph.ir.builder import Builder
from peftgraph.rewrite.match import Match, Own
from peftgraph.rewrite.weight_views import Bound
from peftgraph.sites import Site
from peftgraph.sites.selectors.selector import Selector

aten = torch.ops.aten


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
    """How what a delta computes enters at its ports."""

    @property
    def port(self) -> str:
        """Where the delta enters when it is a single value."""
        ...

    def entered(self, m: Match, op: Builder, delta: fx.Node | Mapping[str, fx.Node]) -> Mapping[str, fx.Node]:
        """The values that the users at some ports get instead of those that are there."""
        ...

    def gated(
        self, m: Match, op: Builder, delta: fx.Node | Mapping[str, fx.Node], gate: fx.Node
    ) -> fx.Node | Mapping[str, fx.Node]:
        """The delta that enters the more, the more a gate is open: at 0 nothing changes, at 1 `delta` enters.

        `gate` is (batch, 1, ..., 1), with as many axes as the delta.
        """
        ...


class PortByPort(ABC):
    """A join at which the value at each port depends on that port's part of the delta alone."""

    port: str

    @abstractmethod
    def enter(self, m: Match, op: Builder, value: fx.Node, delta: fx.Node) -> fx.Node:
        """What the port's users get instead of `value`."""

    @abstractmethod
    def gate(self, m: Match, op: Builder, value: fx.Node, delta: fx.Node, gate: fx.Node) -> fx.Node:
        """As much of `delta` as the gate lets in."""

    def entered(self, m: Match, op: Builder, delta: fx.Node | Mapping[str, fx.Node]) -> dict[str, fx.Node]:
        """Each port's new value."""
        return {port: self.enter(m, op, m.value(port), part) for port, part in self._parts(delta).items()}

    def gated(self, m: Match, op: Builder, delta: fx.Node | Mapping[str, fx.Node], gate: fx.Node) -> dict[str, fx.Node]:
        """Each port's part, gated."""
        return {port: self.gate(m, op, m.value(port), part, gate) for port, part in self._parts(delta).items()}

    def _parts(self, delta: fx.Node | Mapping[str, fx.Node]) -> Mapping[str, fx.Node]:
        return {self.port: delta} if isinstance(delta, fx.Node) else delta


@dataclass(frozen=True)
class Add(PortByPort):
    """y -> y + delta, on the site's own columns."""

    port: str = "output"

    def enter(self, m: Match, op: Builder, value: fx.Node, delta: fx.Node) -> fx.Node:
        """y + delta."""
        return m.on_columns(op, value, lambda part: op.add(part, delta))

    def gate(self, m: Match, op: Builder, value: fx.Node, delta: fx.Node, gate: fx.Node) -> fx.Node:
        """g delta."""
        return op.mul(delta, gate)


@dataclass(frozen=True)
class AddProduct:
    """y -> y + x D^T for a change D of the site's weight: delta is x D^T, on the site's own columns. Where a change can
    only enter the weight itself, W -> W + D, delta is D (O, I), and all who read the weight read the changed one.

    `turns`: the delta is also right where another site multiplies by the transpose of the same weight, with the same
    parameters (`Match.transposed`).
    """

    port: str = "output"
    turns: bool = False

    def entered(self, m: Match, op: Builder, delta: fx.Node | Mapping[str, fx.Node]) -> dict[str, fx.Node]:
        """The new output; or the new weight, for each name that it is read under."""
        assert isinstance(delta, fx.Node)
        if m.form == "output":
            return {"output": m.on_columns(op, m.value("output"), lambda part: op.add(part, delta))}
        changed = m.changed_weight(op, m.value("weight"), delta)
        first, *others = m.ports_of_weight()
        return {first: changed, **{port: op.call(aten.alias.default, changed) for port in others}}

    def gated(self, m: Match, op: Builder, delta: fx.Node | Mapping[str, fx.Node], gate: fx.Node) -> fx.Node:
        """g delta.

        Raises:
            PeftGraphError: the change enters the weight, which all rows of a batch share.
        """
        assert isinstance(delta, fx.Node)
        if m.form == "weight":
            raise PeftGraphError(
                f"{m.site.id}: a change of {m.weight.view} enters the weight itself, which all rows of a batch share, "
                "so no gate can weigh it by row. Choose other sites for the gated pass."
            )
        return op.mul(delta, gate)


@dataclass(frozen=True)
class Multiply(PortByPort):
    """y -> y * delta, on the site's own columns."""

    port: str = "output"

    def enter(self, m: Match, op: Builder, value: fx.Node, delta: fx.Node) -> fx.Node:
        """y * delta."""
        return m.on_columns(op, value, lambda part: op.mul(part, delta))

    def gate(self, m: Match, op: Builder, value: fx.Node, delta: fx.Node, gate: fx.Node) -> fx.Node:
        """1 + g (delta - 1)."""
        return op.call(aten.add.Scalar, op.mul(op.call(aten.sub.Scalar, delta, 1.0), gate), 1.0)


@dataclass(frozen=True)
class Replace(PortByPort):
    """y -> delta. Unless delta is computed `anew`, it is made of y, and other passes may replace y as well."""

    port: str = "output"
    anew: bool = True

    def enter(self, m: Match, op: Builder, value: fx.Node, delta: fx.Node) -> fx.Node:
        """delta itself."""
        return delta

    def gate(self, m: Match, op: Builder, value: fx.Node, delta: fx.Node, gate: fx.Node) -> fx.Node:
        """y + g (delta - y)."""
        return op.add(value, op.mul(op.call(aten.sub.Tensor, delta, value), gate))


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
        check: refuses sites that the rule cannot be put on together.
        where: keeps the matches for which it holds.
        lacking: what a site for which it does not hold lacks, for the message when none is left.
        optional: whether no site at all is fine, as long as another rule of the pass has one.
        reads: what the delta is computed from, for a gate to look at; the site's input by default.
        by_row: the parameters that have an axis of the site's output features, each with that axis, counted from the
            end, at a match; given where the fold makes each row of the new weight, and entry of the new bias, from the
            old one and that row of these alone. It is then folded a part at a time.
        rows: for a rule that changes some rows alone of the table that its sites read: which. All who read the table,
            by any name that is tied to it, are sites of the pass, so that they fold together and the tie stays.
        training_only: whether the edit changes nothing in evaluation, so that folding takes it out.
        level: how deep the edit is nested, when that is not the level of the site's role: it enters above edits of
            a lower level, whatever was applied first.
    """

    at: Selector
    delta: Delta | None
    fold: Fold | str
    join: Join = field(default_factory=Add)
    rank: int | None = None
    own: Own = "all"
    check: Callable[[Sequence[Site]], None] | None = None
    where: Callable[[Match], bool] | None = None
    lacking: str = "has a bias. Choose others; bitfit{zero=true} adds biases"
    optional: bool = False
    reads: Callable[[Match, Builder], fx.Node] | None = None
    by_row: Callable[[Match], Mapping[str, int]] | None = None
    rows: Sequence[int] | None = None
    level: int | None = None
    training_only: bool = False


def trained(m: Match, p: Params) -> Mapping[Bound, Tensor]:
    """The fold of parameters that train in place: they are the new weights already."""
    return {}


def Train(at: Selector, own: Own = "all", where: Callable[[Match], bool] | None = None, optional: bool = False) -> Rule:
    """A rule that makes the sites' own parameters trainable, or their biases, and computes nothing new.

    A stored tensor trains whole: of a fused projection's bias, all that is stored.
    """
    if own == "bias" and where is None:
        where = _has_bias
    return Rule(at=at, delta=None, fold=trained, own=own, where=where, optional=optional)


def _has_bias(m: Match) -> bool:
    return m.site.bias is not None
