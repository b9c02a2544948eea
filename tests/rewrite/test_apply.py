"""Applying passes: what is refused before anything is rewritten, what is counted, what is removed."""

from __future__ import annotations

import pytest
import torch
import zoo
from torch import fx

import peftgraph as pg
from peftgraph.authoring import Builder, Match, Pass
from peftgraph.passes import IA3, BitFit, LoRA, SerialAdapter


@pytest.mark.parametrize(
    ("name", "methods", "error", "words"),
    [
        ("llama", (BitFit(),), pg.NoMatch, "no stored vector is added"),
        ("nano", (LoRA(at="ffn.gate"),), pg.NoMatch, "ffn.gate"),
        ("nano", (LoRA(at="attention.q&layers(7)"),), pg.NoMatch, "layers"),
        ("t5", (LoRA(at="attention.q&layers(0)"),), pg.Ambiguous, r'Add &stack\("decoder"\) for one of them'),
        ("nano", (LoRA(at=pg.attention.q.where(path="no/such")),), pg.NoMatch, "no/such"),
        (
            "nano",
            (LoRA(at="attention.q", rank=49),),
            pg.RecipeError,
            "rank 49 is larger than 0.attention.q allows: 48 x 48, at most 48",
        ),
        (
            "nano",
            (LoRA(), LoRA()),
            pg.Conflict,
            r"0?.*would make the parameter stack.0.mix.q.lora_A at 0.attention.q, which exists already \(made by lora",
        ),
        ("nano", (LoRA(name="a"), LoRA(at="ffn.up", name="a")), pg.Conflict, "are both a lora called 'a'"),
        ("nano", (BitFit(), BitFit()), pg.Conflict, r"both train .* \(at 0"),
        ("nano", (IA3(at="attention"),), pg.RecipeError, "has no weight to fold a scale into"),
        ("nano", (3,), pg.RecipeError, r"apply\(\) takes passes such as LoRA\(rank=8\), or their text, got int"),
    ],
)
def test_what_cannot_be_applied_says_why(
    name: str, methods: tuple[Pass, ...], error: type[Exception], words: str
) -> None:
    base = zoo.traced(name)
    text = base.text()
    with pytest.raises(error, match=words):
        base.apply(*methods)
    assert base.text() == text


def test_a_computation_that_is_not_defined_names_its_operands() -> None:
    class Doubled(LoRA):
        def delta(self, m: Match, op: Builder) -> fx.Node:
            y = super().delta(m, op)
            return op.call(torch.ops.aten.mm.default, y, y)

    with pytest.raises(pg.PeftGraphError, match=r"at 0.attention.q computes mm\(.*, which is not defined: "):
        zoo.traced("nano").apply(Doubled(at="attention.q", rank=2))


def test_naming_the_stack_makes_layers_unambiguous() -> None:
    base = zoo.traced("t5")
    assert len(base.apply(LoRA(at='attention.q&layers(0)&stack("encoder")', rank=2)).edits) == 1
    both = base.apply(LoRA(at='attention.q&layers(0)&(stack("encoder")|stack("decoder"))', rank=2))
    assert len(both.edits) == 3


def test_two_named_adapters_stand_at_one_site() -> None:
    base = zoo.traced("nano")
    program = zoo.randomise(base.apply(LoRA(rank=2, name="a"), LoRA(rank=3, name="b")))
    assert program.table["stack.0.mix.q.a.lora_A"].tensor.shape == (2, zoo.WIDTH)
    assert program.table["stack.0.mix.q.b.lora_A"].tensor.shape == (3, zoo.WIDTH)
    alone = program.remove("b")
    assert [applied.name for applied in alone.history] == ["a"]
    assert alone.table["stack.0.mix.q.a.lora_A"] is program.table["stack.0.mix.q.a.lora_A"]
    assert pg.fold(program).text() == base.text()


def test_removing_what_is_not_there() -> None:
    program = zoo.traced("nano").apply(LoRA(name="a"))
    with pytest.raises(pg.PeftGraphError, match=r"No pass is called 'b'. Applied: \['a'\]"):
        program.remove("b")
    with pytest.raises(pg.PeftGraphError, match="There is no pass number 3; 1 were applied"):
        program.remove(3)


def test_counts() -> None:
    base = zoo.traced("bert")
    total = sum(p.numel() for p in zoo.build("bert").parameters())
    d, f, layers, rank = zoo.WIDTH, zoo.FFN, zoo.LAYERS, 3
    assert base.count().total == total
    assert base.count().trainable == base.count().changed == 0

    lora = base.apply(LoRA(rank=rank)).count()
    assert lora.trainable == lora.added == layers * 2 * 2 * d * rank
    assert lora.changed == layers * 2 * d * d
    assert {change.rank for change in lora.changes} == {rank}

    ia3 = base.apply(IA3()).count()
    assert ia3.trainable == layers * (2 * d + f)
    assert ia3.changed == layers * (2 * d * d + 2 * d + d * f)
    assert all(change.full for change in ia3.changes if change.rank is not None)

    bitfit = base.apply(BitFit()).count()
    assert bitfit.trainable == bitfit.changed == layers * (7 * d + f) + 2 * d
    assert bitfit.added == 0

    serial = base.apply(SerialAdapter(width=4)).count()
    assert serial.trainable == serial.added == layers * 2 * (2 * d * 4 + 4 + d)
    assert serial.changed == 0
    assert str(serial).endswith("changes: none")


def test_two_passes_that_change_the_same_values_are_counted_once() -> None:
    both = zoo.traced("bert").apply(LoRA(at="attention.k", rank=2), IA3(at="attention.k")).count()
    assert both.changed == zoo.LAYERS * (zoo.WIDTH**2 + zoo.WIDTH)


def test_a_tied_weight_is_counted_once() -> None:
    model = zoo.build("llama")
    assert zoo.traced("llama").count().total == sum(p.numel() for p in model.parameters())


def test_initial_values_come_from_torchs_generator() -> None:
    base = zoo.traced("nano")
    hashes = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        hashes.append(base.apply(LoRA(rank=2)).table.hashes())
    assert hashes[0] == hashes[1] != hashes[2]
