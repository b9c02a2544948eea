"""What the sites of one pass share: a parameter, a value, and a gate that is open under eval()."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
import zoo
from torch import Tensor, fx

import peftgraph as pg
from peftgraph.authoring import Builder, Match, Multiply, ParameterValue, Params, Pass, Rule
from peftgraph.authoring.modules import init
from peftgraph.ir.modes import evaluation_graph

F64 = torch.float64
aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class Tied(Pass):
    """W -> diag(exp(l)) W at every site, with one l for all of them."""

    word = "tied"
    at: pg.Selector = pg.attention.o | pg.ffn.down

    def rules(self) -> list[Rule]:
        return [Rule(at=self.at, delta=self.delta, join=Multiply(), fold=self.fold)]

    def delta(self, m: Match, op: Builder) -> fx.Node:
        return op.call(aten.exp.default, op.shared_param("l", (m.features,), init.zeros))

    def fold(self, m: Match, p: Params) -> Mapping[ParameterValue, Tensor]:
        scale = p.l.exp()
        assert m.bias is not None
        return {m.weight: scale[:, None] * m.weight.value, m.bias: scale * m.bias.value}


@dataclass(frozen=True, kw_only=True)
class Lottery(Pass):
    """One draw for all sublayers: their outputs double, or stay; under eval() they double."""

    word = "lottery"

    def rules(self) -> list[Rule]:
        return [Rule(at=pg.attention | pg.ffn, delta=self.delta, fold="it is drawn")]

    def delta(self, m: Match, op: Builder) -> fx.Node:
        draw = op.shared_value("draw", lambda: op.call(aten.randint.default, 2, [1], dtype=F64, device=op.device))
        return op.scale_in_training(m.output, draw)


def answer(program: pg.Program, training: bool = False) -> Tensor:
    with torch.no_grad():
        return program.module().train(training)(idx=torch.arange(12).view(2, 6))["logits"]


def test_a_shared_parameter_is_made_once_and_folds_at_every_site() -> None:
    base = zoo.traced("nano", "sdpa", F64)
    tuned = base.apply(Tied())
    assert list(tuned.table.trainable) == ["tied.l"]
    assert tuned.count().trainable == tuned.count().added == zoo.WIDTH
    zoo.randomise(tuned, 0.5)
    folded = pg.fold(tuned)
    assert "tied.l" not in folded.table
    torch.testing.assert_close(answer(folded), answer(tuned), rtol=1e-12, atol=1e-12)
    assert float((answer(base) - answer(tuned)).abs().max()) > 0.1


def test_its_gradient_is_the_sum_over_the_sites() -> None:
    tuned = zoo.randomise(zoo.traced("nano", "sdpa", F64).apply(Tied()), 0.5)
    apart = zoo.traced("nano", "sdpa", F64).apply(
        *(Tied(at=f"{role}&layers({i})", name=f"{role[-1]}{i}") for role in ("attention.o", "ffn.down") for i in (0, 1))
    )
    with torch.no_grad():
        for parameter in apart.table.trainable.values():
            parameter.copy_(tuned.table.trainable["tied.l"])
    for program in (tuned, apart):
        program.module().eval()(idx=torch.arange(12).view(2, 6))["logits"].square().sum().backward()
    total = sum(parameter.grad for parameter in apart.table.trainable.values())
    torch.testing.assert_close(tuned.table.trainable["tied.l"].grad, total, rtol=1e-12, atol=1e-12)


def test_removing_takes_the_shared_parameter_along() -> None:
    base = zoo.traced("nano", "sdpa", F64)
    left = base.apply(Tied(), Tied(name="again")).remove("again")
    assert list(left.table.trainable) == ["tied.l"]
    assert left.text() == base.apply(Tied()).text()
    assert left.remove().text() == base.text()
    assert left.remove().table.hashes() == base.table.hashes()


def test_two_without_names_conflict() -> None:
    with pytest.raises(pg.Conflict, match=r"would make the parameter tied\.l at 0\.attention\.o, which exists already"):
        zoo.traced("nano", "sdpa", F64).apply(Tied(), Tied())


def test_a_shared_value_is_drawn_once_in_training_and_absent_under_eval() -> None:
    base = zoo.traced("nano", "sdpa", F64)
    tuned = base.apply(Lottery())
    assert tuned.text().count("= randint(") == 1
    doubled = zoo.Nano().double()
    doubled.load_state_dict({name: entry.tensor for name, entry in base.table.items()})
    with torch.no_grad():
        for block in doubled.stack:
            for linear in (block.out, block.proj):
                linear.weight *= 2
                linear.bias *= 2
    wanted = doubled.eval()(idx=torch.arange(12).view(2, 6))["logits"]
    torch.testing.assert_close(answer(tuned), wanted, rtol=1e-12, atol=1e-12)
    assert not any(node.target is aten.randint.default for node in evaluation_graph(tuned.graph).nodes)
    assert tuned.remove().text() == base.text()


def test_the_draw_is_one_for_all_sites() -> None:
    torch.manual_seed(0)
    model = zoo.Nano().double()
    for block in model.stack:
        block.drop.p = 0.0
    base = pg.trace(model, {"idx": torch.arange(12).view(2, 6)})
    tuned = base.apply(Lottery())
    seen = {round(float(answer(tuned, training=True).abs().sum()), 6) for _ in range(20)}
    assert seen == {round(float(answer(program).abs().sum()), 6) for program in (base, tuned)}
