"""Joins of one's own: what they return is checked, and two that ignore one value conflict."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from torch import fx, nn

import peftgraph as pg
from peftgraph.authoring import Add, Builder, Match, Pass, PortByPort, Rule
from peftgraph.authoring.gates import gated
from peftgraph.authoring.modules import init

aten = torch.ops.aten


@dataclass(frozen=True)
class Own(PortByPort):
    """Combines and gates by two functions."""

    combined: Callable[[Builder, fx.Node, fx.Node], Any] = lambda op, value, delta: op.add(value, delta)
    weighed: Callable[[Builder, fx.Node, fx.Node], Any] = lambda op, delta, gate: op.mul(delta, gate)
    port: str = "output"
    exclusive: bool = False

    def combine_port(self, m: Match, op: Builder, value: fx.Node, delta: fx.Node) -> fx.Node:
        return self.combined(op, value, delta)

    def gate_port(self, m: Match, op: Builder, value: fx.Node, delta: fx.Node, gate: fx.Node) -> fx.Node:
        return self.weighed(op, delta, gate)


class Elsewhere(Add):
    """Returns a port that no projection has."""

    def combine(self, m: Match, op: Builder, delta: Any) -> Mapping[str, fx.Node]:  # pyright: ignore
        return {"sideways": delta}


@dataclass(frozen=True, kw_only=True)
class Shift(Pass):
    """Adds a vector by a join that is given."""

    word = "shift"
    join: Any = field(default_factory=Own)
    gate: bool = False

    def rules(self) -> list[Rule]:
        rule = Rule(at=pg.linear, delta=self.delta, join=self.join, fold="it is a test")
        return [gated(rule, self.half)] if self.gate else [rule]

    def delta(self, m: Match, op: Builder) -> fx.Node:
        return op.param(self.name or "shift", (m.features,), init.zeros)

    def half(self, m: Match, op: Builder, x_BTD: fx.Node) -> fx.Node:
        return op.call(aten.sum.dim_IntList, x_BTD, [1, 2])


@cache
def program() -> pg.Program:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.down(torch.relu(self.up(x)))

    return pg.trace(Model(), {"x": torch.randn(2, 5, 6)}, verify="off")


WRONG: dict[str, tuple[Any, str]] = {
    "no join": ("add", r"the join of a rule must be a peftgraph\.authoring\.Join"),
    "port": (Elsewhere(), r"returns a value for the port 'sideways', which .* does not have; it has input"),
    "nothing": (Own(lambda op, value, delta: None), r"Own\.combine must return a mapping from ports to nodes"),
    "shape": (Own(lambda op, value, delta: delta), r"returns for the port 'output' \d, and the value there is"),
    "dtype": (
        Own(lambda op, value, delta: op.call(aten.gt.Scalar, value, 0.0)),
        r"'output' torch\.bool, and the value",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_join_is_told_with_the_pass_and_the_site(case: str) -> None:
    join, words = WRONG[case]
    with pytest.raises(pg.PeftGraphError, match=rf"shift.*{words}"):
        program().apply(Shift(join=join))


def test_a_wrong_gate_is_told() -> None:
    fresh = program().apply(Shift(gate=True))
    assert len(fresh.edits) == 2
    with pytest.raises(pg.PeftGraphError, match=r"shift.*Own\.gate returns .* for the port 'output', and the delta is"):
        program().apply(Shift(gate=True, join=Own(weighed=lambda op, delta, gate: gate)))


def test_two_exclusive_joins_at_one_port_conflict() -> None:
    first = program().apply(Shift(join=Own(exclusive=True), name="a"))
    with pytest.raises(pg.Conflict, match="both replace the output of"):
        first.apply(Shift(join=Own(exclusive=True), name="b"))
    assert len(first.apply(Shift(name="b")).edits) == 4


def test_a_join_may_change_the_weight() -> None:
    def doubled(op: Builder, value: fx.Node, delta: fx.Node) -> fx.Node:
        return op.add(op.call(aten.mul.Scalar, value, 2.0), op.call(aten.unsqueeze.default, delta, -1))

    tuned = program().apply(Shift(join=Own(doubled, port="weight")))
    x = torch.randn(2, 5, 6)
    assert not torch.equal(tuned.module()(x=x), program().module()(x=x))
    assert tuned.remove().text() == program().text()
    with pytest.raises(pg.NoFold, match="it is a test"):
        pg.fold(tuned)
