"""Passes add inputs to a model: one placeholder for all that ask, known to calls, trainers, generation and files."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import laws
import pytest
import torch
import zoo
from torch import Tensor, fx, nn

import peftgraph as pg
from peftgraph.authoring import Add, Builder, Match, Multiply, Pass, Rule
from peftgraph.authoring.modules import init
from peftgraph.passes import LoRA
from peftgraph.rewrite.registry import temporarily_registered
from peftgraph.testing import check_pass

aten = torch.ops.aten
F64 = torch.float64


@dataclass(frozen=True, kw_only=True)
class TaskScale(Pass):
    """y -> y + s[task] y, with a vector s for each task and site; `task_ids` names the task of each row."""

    word = "task_scale"
    at: pg.Selector = pg.ffn.down | pg.attention.v
    tasks: int = 3
    default: int = 0

    def rules(self) -> list[Rule]:
        return [Rule(at=self.at, delta=self.delta, fold="it depends on the task of a row")]

    def delta(self, m: Match, op: Builder) -> fx.Node:
        table = op.param("task_scale", (self.tasks, m.features), init.zeros)
        ids = op.input("task_ids", ("B",), torch.int64, default=self.default)
        return op.mul(m.output, op.call(aten.unsqueeze.default, op.call(aten.embedding.default, table, ids), 1))


@dataclass(frozen=True, kw_only=True)
class Strength(Pass):
    """y -> (1 + s) y, and (1 + s c) y in training, with factors c that calls give for each row; it folds."""

    word = "strength"
    at: pg.Selector = pg.ffn.down
    name_of_input: str = "strength"
    size: str = "B"

    def rules(self) -> list[Rule]:
        return [Rule(at=self.at, delta=self.delta, join=Multiply(), fold=self.fold)]

    def delta(self, m: Match, op: Builder) -> fx.Node:
        one = op.call(aten.ones_like.default, scale := op.param("s", (m.features,), init.zeros))
        given = op.cast(op.input(self.name_of_input, (self.size,), torch.float32, default=1.0), "dtype")
        rows = op.mul(op.call(aten.reshape.default, given, [-1, 1, 1]), scale)
        return op.by_mode(op.add(one, scale), op.add(rows, one))

    def fold(self, m: Match, p: Any) -> Any:
        factor = 1 + p.s
        return {m.weight: m.weight.value * factor[:, None]} | ({m.bias: m.bias.value * factor} if m.bias else {})


@dataclass(frozen=True, kw_only=True)
class Levels(Pass):
    """y -> y + l_i y at the i-th of two layers: an input that no row has an entry of, and every call must give."""

    word = "levels"

    def rules(self) -> list[Rule]:
        return [Rule(at=pg.ffn.down, delta=self.delta, join=Add(), fold="calls give it")]

    def delta(self, m: Match, op: Builder) -> fx.Node:
        level = op.call(aten.select.int, op.input("levels", (2,), F64), 0, m.site.layer)
        return op.mul(op.mul(m.output, level), op.param("l", (1,), nn.init.ones_))


def base_of(name: str) -> pg.Program:
    return laws.base_of(name).program


def placeholders(program: pg.Program) -> list[str]:
    return [node.name for node in program.graph.find_nodes(op="placeholder")]


def logits(program: pg.Program, **inputs: Any) -> Tensor:
    return program.module().eval()(**inputs).logits


def test_the_laws() -> None:
    assert "removal" in check_pass(TaskScale(), ["decoder", "vision"])
    assert "fold" in check_pass(Strength(), ["encoder"])


def test_sites_and_passes_share_one_input() -> None:
    base = base_of("llama")
    once = base.apply(TaskScale())
    twice = once.apply(TaskScale(at="attention.q"), Strength())
    assert placeholders(once) == [*placeholders(base), "task_ids"]
    assert placeholders(twice) == [*placeholders(base), "task_ids", "strength"]
    assert "  + input task_ids?: i64[B]" in str(once.diff(base)).splitlines()
    assert not any("input" in line for line in str(base.apply(LoRA()).diff(base)).splitlines())
    assert "task_ids?: i64[B]" in once.text().splitlines()[0]
    assert twice.remove(-1).text() == once.apply(TaskScale(at="attention.q")).text()
    assert placeholders(twice.remove(0).remove(0)) == [*placeholders(base), "strength"]
    again = twice.remove(0).remove(0).remove(0)
    assert again.text() == base.text()
    assert (again.signature, len(again.example)) == (base.signature, len(base.example))


def test_rows_have_tasks_of_their_own() -> None:
    base = base_of("llama")
    tuned = zoo.randomise(base.apply(TaskScale(), LoRA(rank=2)), 0.5)
    inputs = zoo.example("llama", 3, 6, F64)
    found = logits(tuned, **inputs, task_ids=torch.tensor([2, 0, 1]))
    for row, task in enumerate([2, 0, 1]):
        alone = logits(
            tuned, **{key: value[row : row + 1] for key, value in inputs.items()}, task_ids=torch.tensor([task])
        )
        assert (alone[0] - found[row]).abs().max() < 1e-12
    assert torch.equal(logits(tuned, **inputs), logits(tuned, **inputs, task_ids=torch.zeros(3, dtype=torch.int64)))
    for wrong, message in ((torch.zeros(2, dtype=torch.int64), "must be equal"), (torch.zeros(3), "has dtype")):
        with pytest.raises(pg.CallError, match=message):
            logits(tuned, **inputs, task_ids=wrong)


def test_what_is_refused() -> None:
    base = base_of("llama")
    with pytest.raises(pg.Conflict, match=r"task_ids: i64\[B\] = 1 at .* and task_scale\{.*\} for task_ids"):
        base.apply(TaskScale(), TaskScale(at="attention.q", default=1))
    with pytest.raises(pg.Conflict, match="has an input 'input_ids' of its own"):
        base.apply(Strength(name_of_input="input_ids"))
    with pytest.raises(pg.RecipeError, match="cannot be called 'input'"):
        base.apply(Strength(name_of_input="input"))
    with pytest.raises(pg.RecipeError, match="a size 'X'; the free sizes of this program are: B, S"):
        base.apply(Strength(size="X"))
    net = base.apply(Levels()).module()
    with pytest.raises(pg.CallError, match="levels"):
        net(**zoo.example("llama", 2, 4, F64))


def test_a_part_that_the_model_calls_takes_no_further_input() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) * 2

    part = pg.trace(Around(), {"x": torch.randn(2, 3, 4)}, root="inner")
    with pytest.raises(pg.Conflict, match="Trace the whole model"):
        part.apply(Strength(at="linear"))


def test_folds_keep_no_input_that_nothing_reads() -> None:
    base = base_of("bert")
    tuned = zoo.randomise(base.apply(Strength()), 0.3)
    folded = pg.fold(tuned)
    assert (folded.signature, folded.text()) == (base.signature, base.text())
    both = zoo.randomise(tuned.apply(TaskScale(at="attention.v"), LoRA(at="attention.q", rank=2)), 0.3)
    part = pg.fold(both, partial=True)
    assert placeholders(part) == [*placeholders(base), "task_ids"]
    assert [applied.method.word for applied in part.history] == ["task_scale"]


def test_a_factor_follows_the_dtype_of_the_module() -> None:
    net: Any = zoo.randomise(base_of("bert").apply(Strength()), 0.3).module().train().bfloat16()
    inputs = zoo.example("bert", 2, 4, F64)
    assert net(**inputs).last_hidden_state.dtype == torch.bfloat16
    assert net(**inputs, strength=torch.ones(2)).last_hidden_state.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_generation_repeats_tasks_for_beams(name: str) -> None:
    net: Any = zoo.randomise(zoo.cached(name, F64).apply(TaskScale()), 0.5).module().eval()
    ids = torch.randint(3, zoo.VOCAB, (3, 7), generator=torch.Generator().manual_seed(5))
    options = {"max_new_tokens": 4, "num_beams": 2, "pad_token_id": 0}
    tasks = torch.tensor([2, 0, 1])
    found = net.generate(ids, attention_mask=torch.ones_like(ids), task_ids=tasks, **options)
    for row in range(3):
        own = ids[row : row + 1]
        alone = net.generate(own, attention_mask=torch.ones_like(own), task_ids=tasks[row : row + 1], **options)
        assert torch.equal(found[row, : alone.shape[1]], alone[0])


def test_generation_keeps_what_rows_share() -> None:
    net: Any = zoo.cached("llama", F64).apply(Levels()).module().eval()
    ids = torch.randint(3, zoo.VOCAB, (2, 5), generator=torch.Generator().manual_seed(5))
    for levels in (torch.tensor([0.5, -0.5], dtype=F64), torch.tensor([2.0, 1.0], dtype=F64)):
        given = {"attention_mask": torch.ones_like(ids), "levels": levels, "max_new_tokens": 3, "pad_token_id": 0}
        found = net.generate(ids, num_beams=2, **given)
        assert torch.equal(
            found[:1], net.generate(ids[:1], num_beams=2, **given | {"attention_mask": torch.ones(1, 5)})
        )


def test_adapters_and_exports(tmp_path: Path) -> None:
    base = base_of("llama")
    with temporarily_registered([TaskScale]):
        tuned = zoo.randomise(base.apply(TaskScale(), LoRA(rank=2)), 0.5)
        again = base.load_adapter(tuned.save_adapter(tmp_path / "adapter"))
    inputs = zoo.example("llama", 3, 5, F64)
    tasks = torch.tensor([1, 2, 0])
    assert torch.equal(logits(again, **inputs, task_ids=tasks), logits(tuned, **inputs, task_ids=tasks))
    loaded: Any = torch.export.load(tuned.export(tmp_path / "model.pt2")).module()
    assert (loaded(**inputs, task_ids=tasks)["logits"] - logits(tuned, **inputs, task_ids=tasks)).abs().max() < 1e-12


def test_rows_with_adapters_and_tasks() -> None:
    base = base_of("llama")
    first, second = (zoo.randomise(base.apply(TaskScale(tasks=n)), 0.5) for n in (2, 3))
    low = zoo.randomise(base.apply(LoRA(rank=2)), 0.5)
    net = base.serve({"first": first, "low": low, "second": second}).module().eval()
    inputs, tasks = zoo.example("llama", 4, 5, F64), torch.tensor([1, 0, 2, 1])
    found = net(**inputs, task_ids=tasks, adapter_ids=["first", "low", "second", None]).logits
    alone = [
        logits(first, **inputs, task_ids=tasks.clamp(max=1)),
        logits(low, **inputs),
        logits(second, **inputs, task_ids=tasks),
    ]
    for row, own in enumerate([*alone, logits(base, **inputs)]):
        assert (found[row] - own[row]).abs().max() < 1e-10
    with pytest.raises(pg.Conflict, match="they cannot be in one program"):
        base.serve({"first": first, "other": base.apply(TaskScale(default=1))})


def test_the_trainer_keeps_the_column() -> None:
    tuned = base_of("llama").apply(TaskScale())
    net: Any = tuned.module()
    assert inspect.signature(net.forward).parameters["task_ids"].default is None
    inputs = zoo.example("llama", 2, 5, F64)
    net(**inputs, task_ids=torch.tensor([1, 1])).logits.square().sum().backward()
    for value in tuned.table.trainable.values():
        assert value.grad is not None
        assert value.grad.any(-1).tolist() == [False, True, False]
