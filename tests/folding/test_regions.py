"""The proof region by region: it finds every region, needs few values at a time, and fails where a fold is wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.functional import conv1d, linear
from torch.utils._python_dispatch import TorchDispatchMode

import peftgraph as pg
from peftgraph.authoring import Builder, Match, ParameterValue, Params, Pass, Rule
from peftgraph.authoring.modules import init
from peftgraph.folding import chunks
from peftgraph.folding.engine import Folding
from peftgraph.folding.proof import ProofError, prove
from peftgraph.folding.region_inputs import RegionInputs
from peftgraph.passes import IA3, BitFit, DoRA, LoRA, TrainableTokens

Facts = Literal["auto", "regions", "outputs", "both"]
FACTS: tuple[Facts, ...] = ("auto", "regions", "outputs", "both")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


class Small(nn.Module):
    """Tokens to scores, through a fused projection, a product with a transposed weight, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm, self.fused = nn.Embedding(13, 6), nn.LayerNorm(6), nn.Linear(6, 18)
        self.turned, self.bias, self.head = (
            nn.Parameter(torch.randn(6, 6)),
            nn.Parameter(torch.randn(6)),
            nn.Linear(6, 5),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.table(tokens))
        q, k, v = self.fused(x).chunk(3, dim=-1)
        x = x + torch.softmax(q @ k.mT / 6**0.5, -1) @ v
        x = x + torch.relu(torch.addmm(self.bias, x.flatten(0, 1), self.turned)).view(x.shape)
        return self.head(x)


@cache
def traced(dtype: torch.dtype = torch.float32) -> pg.Program:
    torch.manual_seed(3)
    return pg.trace(Small().to(dtype).eval(), (torch.randint(0, 13, (2, 5)),))


def tuned(*methods: Pass, dtype: torch.dtype = torch.float32) -> pg.Program:
    program = traced(dtype).apply(*methods)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in program.table.trainable.values():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return program


METHODS: dict[str, tuple[Pass, ...]] = {
    "lora": (LoRA(at="attention.*|projection|head", rank=2),),
    "a part of a fused weight": (LoRA(at="attention.k", rank=2),),
    "table": (LoRA(at="embedding", rank=2),),
    "rows": (TrainableTokens(tokens=(3, 11)),),
    "rows and table": (TrainableTokens(tokens=(3, 11)), LoRA(at="embedding", rank=2)),
    "biases": (BitFit(),),
    "scales": (IA3(at="attention.v|projection|head"),),
    "scaled inputs": (IA3(at="projection|head", side="input"), LoRA(at="head", rank=2)),
    "directions": (DoRA(at="attention.q|projection|head", rank=2), BitFit()),
}


@pytest.mark.parametrize("name", METHODS)
def test_what_folds_is_proved_by_its_regions(name: str) -> None:
    proof = pg.fold(tuned(*METHODS[name]), prove="regions").proof
    assert proof is not None
    assert proof.regions is not None, proof.no_regions
    assert proof.regions.error <= proof.regions.bound < 1e-12
    assert proof.probes == ()
    assert "in float64, on random inputs" in str(proof)


@pytest.mark.parametrize("facts", FACTS)
def test_what_is_proved_is_what_was_asked_for(facts: Facts) -> None:
    proof = pg.fold(tuned(LoRA(at="head", rank=2)), prove=facts).proof
    assert proof is not None
    assert (proof.regions is not None) == (facts != "outputs")
    assert bool(proof.probes) == (facts != "regions")


def test_an_unknown_word_is_refused() -> None:
    with pytest.raises(pg.PeftGraphError, match=r"prove must be one of 'auto', 'regions', .*, got 'nothing'"):
        pg.fold(tuned(LoRA(at="head", rank=2)), prove="nothing")  # pyright: ignore[reportArgumentType]


# Mutants: what a fold may get wrong.


@dataclass(frozen=True, kw_only=True)
class Mutant(LoRA):
    """A LoRA whose fold is wrong at one site."""

    word = "mutant"
    at: pg.Selector = pg.attention.q | pg.attention.v | pg.head
    rank: int = 2
    kind: str = "dropped"

    def fold(self, m: Match, p: Params) -> Mapping[ParameterValue, Tensor]:
        ((weight, value),) = super().fold(m, p).items()
        if m.site.role != "attention.v":
            return {weight: value}
        change = value - weight.value
        wrong = {
            "dropped": torch.zeros_like(change),
            "one percent": 1.01 * change,
            "other sign": -change,
            "transposed": change[:, : len(change)].mT if change.shape[0] == change.shape[1] else change.flip(0),
        }
        return {weight: weight.value + wrong[self.kind]}


@pytest.mark.parametrize("kind", ["dropped", "one percent", "other sign", "transposed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("facts", FACTS)
def test_a_fold_that_is_wrong_at_one_site_is_refused(facts: Facts, dtype: torch.dtype, kind: str) -> None:
    words = (
        "Outputs on 2x5 in float64 differ by" if facts == "outputs" else "the folded weights and the passes differ by"
    )
    with pytest.raises(ProofError, match=words):
        pg.fold(tuned(Mutant(kind=kind), dtype=dtype), prove=facts)


def base_weight(before: Tensor, after: Tensor) -> Tensor:
    return before.clone()


def other_scale(before: Tensor, after: Tensor) -> Tensor:
    return before + ((after - before).float() * 1.3).to(before.dtype)


def other_window(before: Tensor, after: Tensor) -> Tensor:
    return before + (after - before).roll(6, 0)


@pytest.mark.parametrize("wrong", [base_weight, other_scale, other_window])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("facts", FACTS)
def test_stored_values_that_are_wrong_are_refused(
    facts: Facts, dtype: torch.dtype, wrong: Callable[[Tensor, Tensor], Tensor]
) -> None:
    program = tuned(LoRA(at="attention.v|head", rank=2), dtype=dtype)
    folding = Folding(program, program.sites).run()
    folded = folding.result(program)
    name = "fused.weight"
    value = wrong(program.table[name].tensor, folded.table[name].tensor)
    other = folded.evolve(table=folded.table.with_tensor(name, nn.Parameter(value, requires_grad=False)))
    with pytest.raises(ProofError, match=r"fused.weight (is \d.* epsilon away|changed outside of)"):
        prove(program, folding, other, facts)


def test_outputs_in_half_precision_are_compared_only_where_they_can_differ() -> None:
    seen = pg.fold(tuned(LoRA(at="head", rank=2), dtype=torch.bfloat16)).proof
    assert seen is not None
    assert [probe.dtype for probe in seen.probes] == ["float64", "bfloat16"] * 2
    assert all(probe.bound < 1 for probe in seen.probes)
    program = traced(torch.bfloat16).apply(LoRA(at="head", rank=2))
    with torch.no_grad():
        program.table["head.lora_B"].tensor.add_(1e-4)
    faint = pg.fold(program).proof
    assert faint is not None
    assert [probe.dtype for probe in faint.probes] == ["float64"] * 2
    assert "rounding in bfloat16 may move them by" in str(faint)


# What a region needs.


class Largest(TorchDispatchMode):
    """Records how many values the largest tensor in float64 has."""

    def __init__(self) -> None:
        super().__init__()
        self.values = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype == torch.float64:
            self.values = max(self.values, result.numel())
        return result


class Wide(nn.Module):
    """Two layers whose weights are larger than a chunk."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(200, 3000), nn.Linear(3000, 200)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


@pytest.mark.parametrize("method", [LoRA(at="projection|head", rank=4), IA3(at="projection|head")], ids=str)
def test_nothing_in_float64_is_as_large_as_a_weight(method: Pass) -> None:
    program = pg.trace(Wide().eval(), (torch.randn(2, 200),)).apply(method)
    with torch.no_grad():
        for parameter in program.table.trainable.values():
            parameter.add_(0.1)
    with Largest() as largest:
        proof = pg.fold(program, prove="regions").proof
    assert proof is not None
    assert proof.regions is not None
    assert largest.values < 2 * chunks.VALUES < 200 * 3000


def test_few_rows_stand_for_a_long_example() -> None:
    program = pg.trace(Small().eval(), (torch.randint(0, 13, (3, 50)),))
    assert RegionInputs(program, (), few=True).given(program.graph.find_nodes(op="placeholder")[0]).shape == (3, 4)
    assert RegionInputs(program, (), few=False).given(program.graph.find_nodes(op="placeholder")[0]).shape == (3, 50)
    adapted = program.apply(LoRA(at="attention.*|head", rank=2))
    proof = pg.fold(adapted, prove="regions").proof
    assert proof is not None
    assert proof.regions is not None


class Convolved(nn.Module):
    """A convolution that a few samples do not fill."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.head = nn.Parameter(torch.randn(6, 3, 9)), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(conv1d(x, self.w, stride=2)).mT)


def test_a_region_that_few_rows_do_not_fill_takes_the_example() -> None:
    program = pg.trace(Convolved().eval(), (torch.randn(2, 3, 40),)).apply(LoRA(at="conv|head", rank=2))
    with torch.no_grad():
        for parameter in program.table.trainable.values():
            parameter.add_(0.1)
    proof = pg.fold(program, prove="regions").proof
    assert proof is not None
    assert proof.regions is not None, proof.no_regions
    assert proof.regions.regions == 2


class Picked(nn.Module):
    """Rows that are chosen by a whole part of a score, which no random score gives."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.head = nn.Parameter(torch.randn(4, 6)), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rows[x.sigmoid().long() * 4])


def test_without_a_region_the_outputs_are_compared() -> None:
    program = pg.trace(Picked().eval(), (torch.randn(8, 30),)).apply(LoRA(at="head|matrix", rank=2))
    with torch.no_grad():
        for parameter in program.table.trainable.values():
            parameter.add_(0.1)
    proof = pg.fold(program, prove="regions").proof
    assert proof is not None
    assert proof.regions is None
    assert proof.probes
    assert "regions   not compared: index" in str(proof)


class Doubled(nn.Module):
    """A projection of h, and one of 2 h."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(6), nn.Parameter(torch.randn(5, 6)), nn.Parameter(torch.randn(5, 6))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return torch.relu(linear(h, self.a)) * torch.relu(linear(h * 2, self.b))


@dataclass(frozen=True, kw_only=True)
class Elsewhere(Pass):
    """y = x W^T -> y + z V^T for the input z of the last projection, which is 2 x; fold: W + 2 V, or W + wrong V."""

    word = "elsewhere"
    at: pg.Selector = pg.head
    times: float = 2.0

    def rules(self) -> list[Rule]:
        return [Rule(at=self.at, delta=self.delta, fold=self.fold, where=lambda m: m.weight.view.parameter == "a")]

    def delta(self, m: Match, op: Builder) -> fx.Node:
        last = m.related(self.at)[-1]
        return op.linear(last.input, op.param("v", m.shape, init.zeros))

    def fold(self, m: Match, p: Params) -> Mapping[ParameterValue, Tensor]:
        return {m.weight: m.weight.value + self.times * p.v}


@pytest.mark.parametrize("times", [2.0, 2.02])
def test_values_may_have_to_enter_together(times: float) -> None:
    program = pg.trace(Doubled().eval(), (torch.randn(2, 3, 6),)).apply(Elsewhere(times=times))
    with torch.no_grad():
        program.table[next(iter(program.table.trainable))].tensor.normal_()
    if times == 2.0:
        proof = pg.fold(program, prove="regions").proof
        assert proof is not None
        assert proof.regions is not None
    else:
        with pytest.raises(ProofError, match="the folded weights and the passes differ by"):
            pg.fold(program, prove="regions")


def test_the_change_of_a_region_is_reported() -> None:
    proof = pg.fold(tuned(LoRA(at="head", rank=2)), prove="regions").proof
    assert proof is not None
    assert proof.regions is not None
    assert proof.regions.change is not None
    assert 1e-3 < proof.regions.change < math.inf
    fresh = pg.fold(traced().apply(LoRA(at="head", rank=2)), prove="regions").proof
    assert fresh is not None
    assert fresh.regions is not None
    assert fresh.regions.change is None
