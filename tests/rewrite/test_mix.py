"""Sums of named adapters: exact, of either sign, and switched without tracing again."""

from __future__ import annotations

import pytest
import torch
import zoo
from torch import Tensor

import peftgraph as pg
from peftgraph.passes import IA3, BitFit, DoRA, LoRA

F64 = torch.float64


@pytest.fixture
def both() -> pg.Program:
    base = zoo.traced("nano", dtype=F64)
    dog = LoRA(at="attention.*|ffn.*", rank=3, alpha=5.0, name="dog")
    toy = LoRA(at="attention.q|ffn.up", rank=2, alpha=7.0, rank_stabilised=True, name="toy")
    torch.manual_seed(0)
    return zoo.randomise(base.apply(dog, toy), 0.2)


def logits(program: pg.Program, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return program.module().eval()(**inputs)["logits"]


def change(program: pg.Program, name: str, scale: float) -> Tensor:
    a, b = (program.table[f"stack.1.fc.{name}.lora_{side}"].tensor for side in "AB")
    return (scale * b @ a).detach()


@pytest.mark.parametrize(("dog", "toy"), [(1.0, 1.0), (0.3, 2.0), (1.0, -0.5), (-1.0, -1.0)])
def test_a_sum_is_exact(both: pg.Program, dog: float, toy: float) -> None:
    mixed, inputs = both.mix({"dog": dog, "toy": toy}), zoo.example("nano")
    folded = pg.fold(mixed)
    torch.testing.assert_close(logits(mixed, inputs), logits(folded, inputs), rtol=0, atol=1e-12)
    assert both.base is not None
    wanted = both.base.table["stack.1.fc.weight"].tensor
    wanted = wanted + dog * change(both, "dog", 5 / 3) + toy * change(both, "toy", 7 / 2**0.5)
    torch.testing.assert_close(folded.table["stack.1.fc.weight"].tensor, wanted, rtol=0, atol=1e-14)


def test_a_negative_weight_is_the_opposite_change(both: pg.Program) -> None:
    assert both.base is not None
    tables = [pg.fold(both.mix({"dog": weight})).table for weight in (1.0, -1.0)]
    for name, entry in both.base.table.items():
        ahead, back = (table[name].tensor for table in tables)
        if name.endswith(("out.weight", "fc.weight", "proj.weight", "mix.weight")):
            assert float((ahead - entry.tensor).abs().max()) > 1e-2
        torch.testing.assert_close(ahead + back, 2 * entry.tensor, rtol=0, atol=1e-13)


def test_switching_keeps_and_shares_the_parameters(both: pg.Program) -> None:
    text, hashes, state = both.text(), both.table.hashes(), torch.get_rng_state()
    only = both.mix({"toy": 1.0})
    assert {applied.name for applied in only.history} == {"toy"}
    assert {name for name in both.table.trainable if ".toy." in name} == only.table.trainable.keys()
    assert all(parameter is both.table[name].tensor for name, parameter in only.table.trainable.items())
    assert both.base is not None
    assert both.mix({}).text() == both.base.text()
    assert both.mix({"dog": 1.0, "toy": 1.0}).text() == text
    assert (both.text(), both.table.hashes()) == (text, hashes)
    assert torch.equal(torch.get_rng_state(), state)


def test_passes_without_a_name_stay(both: pg.Program) -> None:
    trained = zoo.randomise(both.apply(IA3(), BitFit()), 0.1)
    mixed, inputs = trained.mix({"dog": 2.0}), zoo.example("nano")
    assert [applied.method.word for applied in mixed.history] == ["lora", "ia3", "bitfit"]
    torch.testing.assert_close(logits(mixed, inputs), logits(pg.fold(mixed), inputs), rtol=0, atol=1e-12)
    assert all(parameter is trained.table[name].tensor for name, parameter in mixed.table.trainable.items())


def test_a_mixture_is_saved_with_its_weights(both: pg.Program, tmp_path) -> None:
    mixed, inputs = both.mix({"dog": 1.0, "toy": -0.5}), zoo.example("nano")
    assert both.base is not None
    loaded = pg.trace(zoo.build("nano", dtype=F64), inputs).load_adapter(mixed.save_adapter(tmp_path / "mixed"))
    assert "weight=-0.5 name=" in str(loaded.recipe)
    assert torch.equal(logits(loaded, inputs), logits(mixed, inputs))


def test_what_cannot_be_mixed(both: pg.Program) -> None:
    with pytest.raises(pg.PeftGraphError, match="No pass is called 'cat'. Named passes: dog, toy"):
        both.mix({"cat": 1.0})
    more = both.apply(DoRA(at="attention.o", rank=2, name="sun"))
    assert len(more.mix({"sun": 1.0}).history) == 1
    with pytest.raises(pg.RecipeError, match=r"dora: its change of the model cannot be weighted.*got 0\.5"):
        more.mix({"sun": 0.5})
    with pytest.raises(pg.RecipeError, match="lora: weight must be finite, got nan"):
        both.mix({"dog": float("nan")})
