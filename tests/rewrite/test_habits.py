"""Passes and selectors as text and in lists, and the hints for those who write the names of peft or of modules."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import peft
import peft_tables
import pytest
import zoo

import peftgraph as pg
from peftgraph import passes
from peftgraph.authoring import Rule, train_parameters
from peftgraph.passes import IA3, BitFit, LoRA, Prefix
from peftgraph.rewrite.peft_options import COMMON, CONFIGS
from peftgraph.rewrite.registry import find_pass

PAGE = Path(__file__).parents[2] / "docs" / "tutorials" / "peft-arguments.md"


@pytest.mark.parametrize(
    "given",
    [
        ("lora{rank=2}; bitfit",),
        ("lora{rank=2}", BitFit()),
        (["lora{rank=2}", BitFit()],),
        (pg.Pipeline(["lora{rank=2}", BitFit()]),),
    ],
    ids=["text", "both", "list", "pipeline"],
)
def test_passes_are_given_as_text_or_in_lists(given: tuple[object, ...]) -> None:
    base = zoo.traced("nano")
    assert base.apply(*given).text() == base.apply(LoRA(rank=2), BitFit()).text()  # type: ignore[arg-type]


def test_a_recipe_is_given_as_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.txt").write_text("bitfit")
    Path("bitfit").write_text("lora")
    base = zoo.traced("nano")
    assert base.apply(Path("mine.txt")).recipe == base.apply("./mine.txt").recipe == BitFit()
    assert pg.load_recipe("./bitfit") == LoRA()
    with pytest.raises(pg.RecipeError, match=r"'bitfit' may be a pass or a file here: write bitfit\{\} or ./bitfit"):
        pg.load_recipe("bitfit")


def test_costs_are_compared_for_text_and_lists() -> None:
    found = pg.compare(zoo.traced("nano"), ["ia3", ["lora{rank=2}", BitFit()]], batch=2, length=4)
    assert found.costs[0].recipe == "ia3"
    assert found.costs[1].trainable == zoo.traced("nano").apply("lora{rank=2}; bitfit").count().trainable
    assert [cost.recipe for cost in pg.compare(zoo.traced("nano"), "ia3", batch=2, length=4)] == ["ia3"]


def test_a_pass_is_removed_by_its_word() -> None:
    tuned = zoo.traced("nano").apply("lora{rank=2}; bitfit; ia3")
    assert [one.method.word for one in tuned.remove("bitfit").history] == ["lora", "ia3"]
    assert [one.method.word for one in tuned.without(["lora", "ia3"]).history] == ["bitfit"]
    named = zoo.traced("nano").apply(LoRA(rank=2, name="a"), LoRA(rank=2, at="ffn.up"), "lora{rank=2 at=ffn.down}")
    with pytest.raises(pg.Ambiguous, match=r"2 passes are 'lora'; remove one by its number in the history: \[1, 2\]"):
        named.remove("lora")
    assert [one.name for one in named.without("lora").history] == ["a"]
    with pytest.raises(pg.PeftGraphError, match=r"No pass is called 'houlsby'. Applied: \['a', 'lora', 'lora'\]"):
        named.without("houlsby")


def test_selectors_are_given_as_text_or_in_lists() -> None:
    both = pg.attention.q | pg.ffn.up
    assert LoRA(at=["attention.q", pg.ffn.up]).at == both  # type: ignore[arg-type]
    assert zoo.traced("nano").sites.select(("attention.q", "ffn.up")) == zoo.traced("nano").sites.select(both)
    assert Rule("attention.q|ffn.up", None, "no").at == both  # type: ignore[arg-type]
    assert train_parameters("norm").at == pg.norm  # type: ignore[arg-type]
    with pytest.raises(pg.PeftGraphError, match="a list of selectors has at least one"):
        LoRA(at=[])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"r": 8}, "lora has no option 'r'. Write rank= in the place of peft's r"),
        ({"lora_alpha": 8}, "Write alpha= in the place of peft's lora_alpha"),
        ({"target_modules": ["q_proj"]}, "Write at= in the place of .* by name, at=.weight.where"),
        ({"modules_to_save": ["classifier"]}, "In its place: a pass of its own: `lora; train{at=head}`"),
        ({"task_type": "CAUSAL_LM"}, "peft's task_type is not needed: the class of the model says it"),
        ({"corda_config": None}, "peft's corda_config has no counterpart"),
        ({"rnk": 8}, "Did you mean 'rank'"),
        ({"at": "q_proj"}, "By structure it usually is attention.q; by name, write weight.where"),
        ({"at": ["query", "value"]}, "By structure it usually is attention.q"),
        ({"at": "my_proj"}, "if it is the name of a module, write weight.where"),
        ({"at": "attention.x"}, "did you mean 'attention.v'"),
        ({"at": "all-linear"}, "what peft calls all-linear is the selector linear"),
        ({"at": ".*attn.*"}, "Names of modules are written weight.where"),
    ],
    ids=lambda one: next(iter(one)) if isinstance(one, dict) else "",
)
def test_the_names_of_peft_and_of_modules_get_a_hint(options: dict[str, object], words: str) -> None:
    with pytest.raises(pg.PeftGraphError, match=words):
        LoRA(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("get_peft_model", "what corresponds is pg.tune"),
        ("PeftModel", "load_adapter"),
        ("LoraConfig", "what it configures is the pass 'lora'"),
        ("LoRA", "from peftgraph.passes import LoRA"),
        ("Nothing", "has no attribute 'Nothing'$"),
        ("nothing", "has no attribute 'nothing'$"),
    ],
)
def test_names_that_are_looked_for_in_the_package_get_a_hint(name: str, words: str) -> None:
    with pytest.raises(AttributeError, match=words):
        getattr(pg, name)


def test_a_module_in_the_place_of_a_program_gets_a_hint() -> None:
    with pytest.raises(pg.PeftGraphError, match="pg.fold takes a program, got .*program_of"):
        pg.fold(zoo.traced("nano").module())  # type: ignore[arg-type]
    with pytest.raises(pg.TraceError, match="An example or a tokenizer comes before the methods"):
        pg.tune(zoo.Nano(layers=1), LoRA())


def test_hints_are_those_of_the_pass() -> None:
    with pytest.raises(pg.RecipeError, match="prefix has no option .* Write length= in the place"):
        Prefix(num_virtual_tokens=3)  # type: ignore[call-arg]
    with pytest.raises(pg.RecipeError, match="ia3 has no option .* Write side= in the place"):
        pg.parse_pass("ia3{feedforward_modules=x}")
    with pytest.raises(pg.RecipeError, match="lora takes its options by name, not 8 alone"):
        LoRA(8)  # type: ignore[misc]
    with pytest.raises(pg.RecipeError, match="LoRA is a class of passes: write LoRA"):
        zoo.traced("nano").apply(LoRA)  # type: ignore[arg-type]
    with pytest.raises(pg.RecipeError, match="got IA3Config. What peft configures with it is the pass 'ia3'"):
        zoo.traced("nano").apply(peft.IA3Config())  # type: ignore[arg-type]
    with pytest.raises(pg.RecipeError, match="got int"):
        zoo.traced("nano").apply([IA3(), 3])  # type: ignore[list-item]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_every_argument_of_peft_is_explained_by_an_option_that_exists(config) -> None:
    common = {field.name for field in dataclasses.fields(peft.PeftConfig)}
    theirs = {field.name for field in dataclasses.fields(getattr(peft, config.name))} - common
    assert theirs <= {one.theirs for one in config.options}
    options = {field.name for field in dataclasses.fields(find_pass(config.word))}
    assert {one.option for one in config.options} - {""} <= options
    assert common <= {one.theirs for one in COMMON}


def test_the_page_has_the_tables() -> None:
    assert peft_tables.tables() in PAGE.read_text(encoding="utf-8")
    assert passes.Train.word == "train"
