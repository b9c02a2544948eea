"""Specs, recipes and pipelines: what is read, and the words for what is not."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import zoo

import peftgraph as pg
from peftgraph.authoring import Pass
from peftgraph.passes import IA3, BitFit, LoRA, Prefix, SerialAdapter, UniPELT
from peftgraph.rewrite.recipe import to_toml

RECIPE = """
[[pass]]
use = "lora"
at = "attention.*&layers(0, 2)"
rank = 4
alpha = 8

[[pass]]
use = "ia3"
"""


def test_a_pass_prints_as_its_spec() -> None:
    text = 'lora{at=attention.q|attention.v rank=8 alpha=16.0 dropout=0.0 init="kaiming" name="task"}'
    assert str(LoRA(name="task")) == text
    assert pg.parse_pass(text) == LoRA(name="task")


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("lora{}", LoRA()),
        ("lora", LoRA()),
        ("lora; bitfit", pg.Pipeline([LoRA(), BitFit()])),
        ("lora{rank=2} bitfit, ia3;", pg.Pipeline([LoRA(rank=2), BitFit(), IA3()])),
        ("unipelt{methods=[lora, prefix]}", UniPELT(methods=(LoRA(), Prefix()))),
        ('lora{at=[attention.q, "ffn.up & layer(1)"]}', LoRA(at="attention.q|(ffn.up&layer(1))")),
        ("lora{rank=4, alpha=2}", LoRA(rank=4, alpha=2.0)),
        ('lora{at="attention.q | attention.v"}', LoRA()),
        ('bitfit{at=bias.where(path="a b.*")}', BitFit(at=pg.bias.where(path="a b.*"))),
        ("  serial_adapter{ width=3\n activation=relu }", SerialAdapter(width=3, activation="relu")),
    ],
)
def test_specs_are_read(text: str, method: Pass) -> None:
    assert pg.parse_pass(text) == method


def test_several_specs_are_a_pipeline() -> None:
    parsed = pg.parse_pass("lora{rank=2}; ia3{}\nbitfit{}")
    assert parsed == pg.Pipeline([LoRA(rank=2), IA3(), BitFit()])
    assert pg.parse_pass(str(parsed)) == parsed


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "An empty recipe"),
        ("lora-2", r"expected '\{', ';' or the end after 'lora'"),
        ("lora rank=8", r"options stand in braces behind the pass, such as lora\{rank=...\}"),
        ("bitfit; 3d", "There is no pass '3d'"),
        ("lora{rank=4", r"no closing '\}'"),
        ("lora{rank}", "expected key=value, found 'rank'"),
        ("lora{at=(attention.q]}", r"unexpected '\]'"),
        ('lora{name="x}', "no closing quote"),
        ("lorra{}", r"There is no pass 'lorra'. Did you mean 'lora'\?"),
        ("lora{rnk=4}", r"lora has no option 'rnk'. Did you mean 'rank'\?"),
        ("lora{rank=many}", "option 'rank' cannot be 'many'"),
        ("lora{rank=2.5}", "option 'rank' cannot be '2.5'"),
        ("lora{rank=0}", "rank must be at least 1, got 0"),
        ("lora{dropout=1.0}", r"dropout must lie in \[0, 1\)"),
        ("lora{at=attention.x}", "attention.x"),
        ("serial_adapter{activation=reluu}", "activation must be one of relu"),
        ('lora{name="two words"}', "a name must be an identifier"),
    ],
)
def test_what_cannot_be_read_says_why(text: str, words: str) -> None:
    with pytest.raises(pg.PeftGraphError, match=words):
        pg.parse_pass(text)


def test_an_error_points_at_its_place() -> None:
    with pytest.raises(pg.RecipeError) as error:
        pg.parse_pass("lora{rank=4} ia3=")
    line, caret = str(error.value).splitlines()[1:]
    assert line.strip() == "lora{rank=4} ia3="
    assert caret.index("^") == len(line) - 1


def test_toml_recipes(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    method = pg.load_recipe(path)
    assert method == pg.Pipeline([LoRA(at=pg.attention.all & pg.layers(0, 2), rank=4, alpha=8.0), IA3()])
    again = tmp_path / "again.toml"
    again.write_text(to_toml(method))
    assert pg.load_recipe(again) == method


def test_a_recipe_may_be_a_file_of_specs_or_a_spec(tmp_path: Path) -> None:
    path = tmp_path / "recipe.txt"
    path.write_text("lora{rank=2}\nia3{}\n")
    assert pg.load_recipe(path) == pg.load_recipe("lora{rank=2} ia3{}")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[[pass]\n", "is no TOML"),
        ("", r"at least one \[\[pass\]\] table"),
        ("[other]\n", "unknown table 'other'"),
        ("[[pass]]\nrank = 2\n", r"\[\[pass\]\] number 1 needs use"),
        ('[[pass]]\nuse = "lora"\nrnk = 2\n', r"number 1: lora has no option 'rnk'"),
        ('[[pass]]\nuse = "lora"\nrank = "a"\n', "option 'rank' cannot be 'a'"),
        ('[[pass]]\nuse = "lora"\nrank = true\n', "option 'rank' cannot be True"),
    ],
)
def test_bad_recipe_files_name_file_and_table(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(pg.RecipeError, match=words) as error:
        pg.load_recipe(path)
    assert "bad.toml" in str(error.value)


def test_a_missing_recipe_is_named() -> None:
    with pytest.raises(pg.RecipeError, match=r"nowhere.toml cannot be read"):
        pg.load_recipe("nowhere.toml")


def test_a_pipeline_is_a_pass() -> None:
    base = zoo.traced("nano")
    pipeline = pg.Pipeline([LoRA(rank=2), pg.Pipeline([IA3()])])
    assert base.apply(pipeline).text() == base.apply(LoRA(rank=2), IA3()).text()
    assert base.apply(pipeline).recipe == pg.Pipeline([LoRA(rank=2), IA3()])
    assert pg.Pipeline(["lora", IA3()]) == pg.Pipeline([LoRA(), IA3()])
    with pytest.raises(pg.RecipeError, match="A pipeline holds passes, got int"):
        pg.Pipeline([3])  # pyright: ignore[reportArgumentType]


def test_options_that_may_be_none_and_truth_values_of_other_kinds() -> None:
    assert [Prefix(hidden=value).hidden for value in (None, 4)] == [None, 4]
    with pytest.raises(pg.RecipeError, match="hidden"):
        Prefix(hidden="four")  # type: ignore[arg-type]
    assert LoRA(rank_stabilised=numpy.bool_(True)).rank_stabilised is True  # type: ignore[arg-type]
    with pytest.raises(pg.RecipeError, match="rank_stabilised"):
        LoRA(rank_stabilised=1)  # type: ignore[arg-type]
