"""Texts and values of strangers: read as what they say, or refused in words, in bounded time."""

from __future__ import annotations

import enum
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import peftgraph as pg
from peftgraph.passes import LoRA, SerialAdapter, TrainableTokens, UniPELT
from peftgraph.rewrite.recipe import to_toml

READERS: dict[str, Callable[[Any], Any]] = {
    "pass": pg.parse_pass,
    "selector": pg.parse_selector,
    "recipe": pg.load_recipe,
    "pattern": pg.Pattern.parse,
}


class Size(enum.IntEnum):
    SMALL = 2


class Start(enum.StrEnum):
    GAUSSIAN = "gaussian"


# values that are no plain Python ones


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        ({"rank": np.int64(3)}, {"rank": 3}),
        ({"rank": Size.SMALL}, {"rank": 2}),
        ({"alpha": np.float64(0.1)}, {"alpha": 0.1}),
        ({"alpha": np.float32(0.5), "dropout": np.float16(0.25)}, {"alpha": 0.5, "dropout": 0.25}),
        ({"alpha": Size.SMALL}, {"alpha": 2}),
        ({"rank_stabilised": np.bool_(True)}, {"rank_stabilised": True}),
        ({"init": Start.GAUSSIAN}, {"init": "gaussian"}),
    ],
    ids=str,
)
def test_numbers_of_others_are_taken_for_what_they_are_equal_to(given: dict[str, Any], plain: dict[str, Any]) -> None:
    method = LoRA(**given)
    assert method == LoRA(**plain)
    assert str(method) == str(LoRA(**plain))
    assert pg.parse_pass(str(method)) == method
    assert all(type(getattr(method, name)) is type(value) for name, value in plain.items())


@pytest.mark.parametrize(
    "given",
    [
        {"rank": True}, {"rank": 2.0}, {"rank": "2"}, {"rank": None}, {"rank": 2**64}, {"rank": np.float64(2.0)},
        {"rank": np.array([2, 3])}, {"alpha": True}, {"alpha": np.bool_(True)}, {"alpha": float("nan")},
        {"alpha": float("inf")}, {"alpha": 10**400}, {"alpha": 2j}, {"alpha": "16"}, {"init": 5}, {"init": ["kaiming"]},
        {"rank_stabilised": 1}, {"rank_stabilised": "true"}, {"name": 5}, {"at": 5}, {"at": None},
    ],
    ids=str,
)  # fmt: skip
def test_what_no_text_can_say_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(pg.PeftGraphError):
        LoRA(**given)


def test_lists_are_of_plain_values_too(tmp_path: Path) -> None:
    method = TrainableTokens(tokens=list(np.array([5, 7])))  # pyright: ignore[reportArgumentType]
    assert method == TrainableTokens(tokens=(5, 7))
    both = pg.Pipeline([method, UniPELT(methods=(LoRA(rank=2), SerialAdapter(width=3)))])
    (tmp_path / "recipe.toml").write_text(to_toml(both))
    assert pg.load_recipe(tmp_path / "recipe.toml") == both


@pytest.mark.parametrize("name", ["class", "None", "lambda", "forward", "train", "training", "add_module", "a.b", "a b",
                                  "", "ä-b", 'a"b', "a\\", "to"])  # fmt: skip
def test_names_that_modules_or_python_have_are_refused_or_load_again(name: str) -> None:
    if not name:
        assert pg.parse_pass(str(LoRA(name=name))) == LoRA()
        return
    with pytest.raises(pg.RecipeError, match="lora: a name"):
        LoRA(name=name)


@pytest.mark.parametrize("name", ["dog", "_", "größe", "x1", "match", "weights"])
def test_other_names_are_those_of_modules(name: str) -> None:
    program = pg.trace(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval(), (torch.randn(2, 3),))
    tuned = program.apply(LoRA(at="head", rank=1, name=name))
    assert pg.parse_pass(str(tuned.recipe)) == tuned.recipe
    assert f"2.{name}.lora_A" in dict(tuned.module().named_parameters())


def test_a_name_that_a_tensor_of_the_model_has_is_refused() -> None:
    program = pg.trace(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval(), (torch.randn(2, 3),))
    with pytest.raises(pg.Conflict, match=r"2.weight is a parameter already.*Give the pass another name"):
        program.apply(LoRA(at="head", rank=1, name="weight"))


def test_a_mixture_with_the_weight_1_is_the_program() -> None:
    program = pg.trace(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval(), (torch.randn(2, 3),))
    tuned = program.apply(LoRA(at="head", rank=1, name="a"))
    assert tuned.mix({"a": 1}) is tuned
    half = tuned.mix({"a": np.float32(0.5)})
    assert half.mix({"a": 1}) is half
    assert str(half.recipe) == str(pg.parse_pass(str(half.recipe)))
    assert half.mix({"a": 2}).text() == tuned.text()
    for weight in (True, "1", None, float("inf"), torch.tensor([1.0, 2.0])):
        with pytest.raises(pg.RecipeError, match="The weight of 'a' cannot be"):
            tuned.mix({"a": weight})  # pyright: ignore[reportArgumentType]


# texts


@pytest.mark.parametrize("value", [5, None, b"lora{}", ["lora{}"], {}, object(), 3.5], ids=lambda v: type(v).__name__)
@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_text_is_refused(reader: str, value: object) -> None:
    with pytest.raises(pg.PeftGraphError):
        READERS[reader](value)


ENDLESS = {
    "brackets": "(" * 50_000,
    "nots": "~" * 50_000 + "head",
    "terms": "|".join(["head"] * 5000),
    "digits": f"layers({'9' * 5000})",
    "conditions": "head" + '.where(path="a")' * 3000,
    "spec": "lora{at=" + "(" * 50_000 + "}",
    "passes": "lora{}" * 3000,
    "nested": "unipelt{methods=[" * 200,
    "word": "x" * 100_000,
    "calls": "m: a = " + "add(" * 3000,
    "choices": "m: a = linear(x)" + "|linear(x)" * 9000,
    "groups": f'head.where(path="{"(" * 5000}")',
    "repeats": 'head.where(path="a{99999999999}")',
    "size": "m: a = linear(x); size(a, 0) == 1e999",
}


@pytest.mark.parametrize("text", ENDLESS.values(), ids=list(ENDLESS))
@pytest.mark.parametrize("reader", READERS)
def test_endless_texts_are_refused_in_few_words(reader: str, text: str) -> None:
    with pytest.raises(pg.PeftGraphError) as error:
        READERS[reader](text)
    assert len(str(error.value)) < 5000


SEEDS = {
    "pass": 'lora{at=attention.q|attention.v rank=8 alpha=16.0 name="a"} unipelt{methods=[lora{rank=2}]}',
    "selector": '~(attention.q|ffn.*)&layers(-2,end).where(path="a.*",shape=(4,8))|pattern("m: a = linear(x)[0:4]").a',
    "pattern": "m: a = linear(~mul(g, u):t|u)[0:4]; g = linear?(x, k=[1, 2.5], s='t'); u = linear(x); size(g, 0) < 2",
}
PIECES = [
    *"{}()[]\"'\\=,;|&~.:*<>09-+e_ \n#ζ٣\0",
    "9" * 30,
    "nan",
    "inf",
    "1e999",
    "((((",
    'pattern("',
    "name=",
    "(a+)+b",
]


def changed(text: str, chance: random.Random) -> str:
    for _ in range(chance.choice([1, 1, 2, 4])):
        at = chance.randrange(len(text) + 1)
        cut = at + chance.choice([0, 0, 1, 3])
        text = text[:at] + chance.choice(["", *PIECES]) + text[cut:]
    return text


@pytest.mark.parametrize("reader", SEEDS)
def test_damaged_texts_are_refused_or_printed_so_that_they_are_read_again(reader: str) -> None:
    chance, read = random.Random(7), READERS[reader]
    accepted = 0
    for _ in range(300):
        try:
            found = read(changed(SEEDS[reader], chance))
        except pg.PeftGraphError:
            continue
        accepted += 1
        assert read(str(found)) == found
    assert accepted > 1


TOML = {
    "no-table": "pass = [1, 2]\n",
    "number": 'pass = 5\n[patterns]\nm = "a = linear(x)"\n',
    "nested": "x = " + "[" * 5000,
    "digits": '[[pass]]\nuse = "lora"\nrank = ' + "9" * 5000,
    "infinite": '[[pass]]\nuse = "lora"\nalpha = inf\n',
    "table": '[[pass]]\nuse = "lora"\nat = {a = 1}\n',
    "list": '[[pass]]\nuse = "lora"\ninit = ["kaiming"]\n',
    "date": '[[pass]]\nuse = "lora"\nrank = 2026-01-01\n',
    "twice": '[[pass]]\nuse = "lora"\nrank = 2\nrank = 3\n',
    "lacking": '[[pass]]\nuse = "trainable_tokens"\n',
    "zero": '[[pass]]\nuse = "lora"\nname = "a\\u0000b"\n',
}


@pytest.mark.parametrize("text", TOML.values(), ids=list(TOML))
def test_hostile_toml(text: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(text)
    with pytest.raises(pg.RecipeError):
        pg.load_recipe(tmp_path / "recipe.toml")


def test_a_recipe_that_is_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "recipe.toml")
    with pytest.raises(pg.RecipeError, match="no regular file"):
        pg.load_recipe(tmp_path / "recipe.toml")


# regular expressions


@pytest.mark.parametrize(("pattern", "slow"), [("((a|aa)+)+c", True), ("(a|a)*b", False), ("(.*)*(.*)*x1", False)])
def test_regular_expressions_take_bounded_time(pattern: str, slow: bool) -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module("a" * 200, nn.Linear(3, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.get_submodule("a" * 200)(x)

    program = pg.trace(Deep().eval(), (torch.randn(2, 3),))
    start = time.monotonic()
    said: list[str] = []
    for _ in range(5):  # what was too slow once is known to be
        with pytest.raises(pg.PeftGraphError) as error:
            program.apply(LoRA(at=f'head.where(path="{pattern}")'))  # pyright: ignore[reportArgumentType]
        said.append(str(error.value))
    assert all(("takes longer than 1 s" in words) == slow for words in said)
    assert time.monotonic() - start < 30


def test_a_regular_expression_says_what_it_is_not() -> None:
    with pytest.raises(pg.PeftGraphError, match="no regular expression"):
        pg.parse_selector('head.where(path="(")')
    assert str(pg.parse_selector('head.where(path="a+b*(c|d)")')) == 'head.where(path="a+b*(c|d)")'
