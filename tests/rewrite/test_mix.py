"""Sums of named adapters: exact, of either sign, and switched without tracing again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import zoo
from torch import Tensor

import peftgraph as pg
from peftgraph.authoring import Pass
from peftgraph.passes import IA3, BitFit, DoRA, LoRA, Prefix

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
    with pytest.raises(pg.RecipeError, match="The weight of 'dog' cannot be nan: expected a finite number"):
        both.mix({"dog": float("nan")})


CREW = (
    LoRA(at="attention.*|ffn.*", rank=3, alpha=5.0, name="dog"),
    LoRA(at="attention.q|ffn.up", rank=2, alpha=7.0, name="toy"),
    LoRA(at="attention.v|ffn.up", rank=1, alpha=3.0, name="cat"),
    IA3(name="scale"),
    Prefix(length=2, hidden=5, name="start"),
)


@pytest.fixture
def crew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pg.Program:
    """Five named adapters out of one directory; from here on nothing can be traced."""
    base = zoo.traced("nano", dtype=F64)
    directory = zoo.randomise(base.apply(*CREW), 0.2).save_adapter(tmp_path / "crew")
    loaded = base.load_adapter(directory)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something was traced again")

    monkeypatch.setattr(torch.export, "export", refuse)
    return loaded


def alone(crew: pg.Program, *methods: Pass) -> pg.Program:
    """These methods put on the base afresh, with the parameters of the crew."""
    assert crew.base is not None
    program = zoo.traced("nano", dtype=F64).apply(*methods)
    with torch.no_grad():
        for name, parameter in program.table.trainable.items():
            parameter.copy_(crew.table[name].tensor)
    return program


@pytest.mark.parametrize("method", CREW, ids=lambda method: method.name)
def test_each_of_one_directory_is_switched_to_and_deleted(crew: pg.Program, method: Pass, tmp_path: Path) -> None:
    inputs, others = zoo.example("nano"), [one for one in CREW if one is not method]
    text, hashes = crew.text(), crew.table.hashes()
    for program, wanted in (
        (crew.only(method.name), alone(crew, method)),
        (crew.without(method.name), alone(crew, *others)),
    ):
        assert program.text() == wanted.text()
        assert torch.equal(logits(program, inputs), logits(wanted, inputs))
        assert all(parameter is crew.table[name].tensor for name, parameter in program.table.trainable.items())
    left = crew.without(method.name).save_adapter(tmp_path / "left")
    files = [file.read_bytes() for file in left.iterdir()]
    assert all(f".{method.name}." not in str(file) and f"name={method.name}" not in str(file) for file in files)
    again = zoo.traced("nano", dtype=F64).load_adapter(left)
    assert [applied.name for applied in again.history] == [one.name for one in others]
    assert torch.equal(logits(again, inputs), logits(crew.without(method.name), inputs))
    assert (crew.text(), crew.table.hashes()) == (text, hashes)


def test_all_of_one_directory_are_disabled_and_more_are_added(crew: pg.Program) -> None:
    base, inputs = zoo.traced("nano", dtype=F64), zoo.example("nano")
    assert crew.only().text() == base.text()
    assert torch.equal(logits(crew.only(), inputs), logits(base, inputs))
    more = crew.apply(LoRA(at="attention.k", rank=1, name="new"))
    assert [applied.name for applied in more.history] == ["dog", "toy", "cat", "scale", "start", "new"]
    assert more.without("new").text() == crew.text()
    with pytest.raises(pg.PeftGraphError, match=r"No pass is called 'cow'. Named passes: \['dog', 'toy', 'cat'"):
        crew.only("cow")
    with pytest.raises(pg.PeftGraphError, match="No pass is called 'cow'"):
        crew.without("cow")


def test_arithmetic_with_one_directory_is_exact(crew: pg.Program) -> None:
    weights = {"dog": 1.0, "toy": -0.5, "cat": 2.25}
    mixed, inputs = crew.mix(weights), zoo.example("nano")
    folded = pg.fold(mixed)
    torch.testing.assert_close(logits(mixed, inputs), logits(folded, inputs), rtol=0, atol=1e-12)
    scales = {"dog": 5.0 / 3, "toy": 7.0 / 2, "cat": 3.0}
    wanted = zoo.traced("nano", dtype=F64).table["stack.1.fc.weight"].tensor
    for name, weight in weights.items():
        wanted = wanted + weight * change(crew, name, scales[name])
    torch.testing.assert_close(folded.table["stack.1.fc.weight"].tensor, wanted, rtol=0, atol=1e-14)
    both = crew.mix({"dog": 0.5, "scale": 1.0, "start": 1.0})
    assert [applied.name for applied in both.history] == ["dog", "scale", "start"]
    with pytest.raises(pg.RecipeError, match="prefix: its change of the model cannot be weighted"):
        crew.mix({"start": 0.5})
