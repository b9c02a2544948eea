"""Joins: how the result of a rule is combined with the values at its site's ports.

For a join of your own, subclass `PortByPort`, or `Join` if the ports depend on one another, and use it as
`Rule(join=...)`. Its results are checked when the pass is applied.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from peftgraph.errors import PeftGraphError
from peftgraph.ir.builder import Builder
from peftgraph.rewrite.match import Match

aten = torch.ops.aten

Delta = fx.Node | Mapping[str, fx.Node]


class Join(ABC):
    """Combines a delta with the values at the ports of a site.

    Attributes:
        port: where the delta enters if it is a single node, not a mapping from ports to nodes.
        exclusive: whether the new values ignore the old ones, so that the second of two such joins at one port would
            undo the first; applying both is a `Conflict`.
        resizes: whether a new value may have other sizes than the old one, as a sequence with prepended rows has. The
            sizes of all values that depend on it are then inferred again.
        shuts: whether a gate of 0 leaves the values as they are. Rows of zeros still take part in an attention.
    """

    port: str = "output"
    exclusive: bool = False
    resizes: bool = False
    shuts: bool = True

    @abstractmethod
    def combine(self, m: Match, op: Builder, delta: Delta) -> Mapping[str, fx.Node]:
        """Return, by port, the new value for the users there."""

    @abstractmethod
    def gate(self, m: Match, op: Builder, delta: Delta, gate: fx.Node) -> Delta:
        """Return the delta scaled by a gate: with 0 nothing changes (if it `shuts`), with 1 `delta` enters as it is.

        Args:
            m: the match.
            op: the builder of the edit.
            delta: what the rule computed.
            gate: (batch, 1, ..., 1), with as many axes as the delta.
        """


class PortByPort(Join):
    """A join that combines each port's value with that port's part of the delta, independently of other ports.

    Example:
        ```python
        @dataclass(frozen=True)
        class Subtract(PortByPort):
            port: str = "output"

            def combine_port(self, m, op, value, delta):
                return op.call(torch.ops.aten.sub.Tensor, value, delta)

            def gate_port(self, m, op, value, delta, gate):
                return op.mul(delta, gate)
        ```
    """

    @abstractmethod
    def combine_port(self, m: Match, op: Builder, value: fx.Node, delta: fx.Node) -> fx.Node:
        """Return the value that the port's users read instead of `value`."""

    @abstractmethod
    def gate_port(self, m: Match, op: Builder, value: fx.Node, delta: fx.Node, gate: fx.Node) -> fx.Node:
        """Return the port's part of the delta, scaled by the gate."""

    def combine(self, m: Match, op: Builder, delta: Delta) -> dict[str, fx.Node]:
        """Combine every port's value."""
        return {port: self.combine_port(m, op, m.value(port), part) for port, part in self._parts(delta).items()}

    def gate(self, m: Match, op: Builder, delta: Delta, gate: fx.Node) -> dict[str, fx.Node]:
        """Gate every port's part."""
        return {port: self.gate_port(m, op, m.value(port), part, gate) for port, part in self._parts(delta).items()}

    def _parts(self, delta: Delta) -> Mapping[str, fx.Node]:
        return {self.port: delta} if isinstance(delta, fx.Node) else delta


@dataclass(frozen=True)
class Add(PortByPort):
    """y -> y + delta, on the site's own columns."""

    port: str = "output"

    def combine_port(self, m: Match, op: Builder, value: fx.Node, delta: fx.Node) -> fx.Node:
        """Compute y + delta."""
        return m.on_columns(op, value, lambda part: op.add(part, delta))

    def gate_port(self, m: Match, op: Builder, value: fx.Node, delta: fx.Node, gate: fx.Node) -> fx.Node:
        """Compute g delta."""
        return op.mul(delta, gate)


@dataclass(frozen=True)
class AddProduct(Join):
    """y -> y + x D^T for a change D of the site's weight: delta is x D^T, on the site's own columns. Where the change
    must be made in the weight itself, W -> W + D, delta is D (O, I), and every reader of the weight reads the changed
    one.

    Attributes:
        port: where x D^T enters.
        turns: whether the delta is also correct at a site that multiplies by the transpose of the same weight, with the
            same parameters (`Match.transposed`).
        into_weight: whether the change enters the weight itself wherever the site is, so that delta is always D (O, I).
    """

    port: str = "output"
    turns: bool = False
    into_weight: bool = False

    def combine(self, m: Match, op: Builder, delta: Delta) -> dict[str, fx.Node]:
        """Compute the new output; or the new weight, under each name that it is read by."""
        assert isinstance(delta, fx.Node)
        if m.form == "output":
            return {"output": m.on_columns(op, m.value("output"), lambda part: op.add(part, delta))}
        changed = m.changed_weight(op, m.value("weight"), delta)
        first, *others = m.ports_of_weight()
        return {first: changed, **{port: op.call(aten.alias.default, changed) for port in others}}

    def gate(self, m: Match, op: Builder, delta: Delta, gate: fx.Node) -> fx.Node:
        """Compute g delta.

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

    def combine_port(self, m: Match, op: Builder, value: fx.Node, delta: fx.Node) -> fx.Node:
        """Compute y * delta."""
        return m.on_columns(op, value, lambda part: op.mul(part, delta))

    def gate_port(self, m: Match, op: Builder, value: fx.Node, delta: fx.Node, gate: fx.Node) -> fx.Node:
        """Compute 1 + g (delta - 1)."""
        return op.call(aten.add.Scalar, op.mul(op.call(aten.sub.Scalar, delta, 1.0), gate), 1.0)


@dataclass(frozen=True)
class Replace(PortByPort):
    """y -> delta.

    Attributes:
        port: where delta enters.
        exclusive: whether delta ignores y. With `exclusive=False` it is computed from y, so that other passes may
            replace y as well.
        resizes: whether delta may have other sizes than y.
    """

    port: str = "output"
    exclusive: bool = True
    resizes: bool = False

    def combine_port(self, m: Match, op: Builder, value: fx.Node, delta: fx.Node) -> fx.Node:
        """Return delta."""
        return delta

    def gate_port(self, m: Match, op: Builder, value: fx.Node, delta: fx.Node, gate: fx.Node) -> fx.Node:
        """Compute y + g (delta - y)."""
        return op.add(value, op.mul(op.call(aten.sub.Tensor, delta, value), gate))
