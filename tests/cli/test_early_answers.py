"""Wrong paths, recipes and arguments are refused before torch is imported, in the words of the late refusal."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest

import peftgraph as pg
from peftgraph.authoring import Pass, Rule
from peftgraph.errors import PeftGraphError
from peftgraph.rewrite.declared_options import PassWithin, declared_options
from peftgraph.rewrite.options import hints
from peftgraph.rewrite.recipe import load_recipe
from peftgraph.rewrite.recipe_check import check_options, check_recipe
from peftgraph.rewrite.registry import PASSES, find_pass, temporarily_registered

RUNNER = """
import json, sys
from typer.testing import CliRunner
from peftgraph.cli.app import app
told = []
for arguments in json.loads(sys.argv[1]):
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "1000"})
    loaded = sorted({"torch", "transformers", "sympy", "networkx"} & set(sys.modules))
    told.append([result.exit_code, result.stderr, loaded])
print(json.dumps(told))
"""

WRONG = (
    "loar{}",
    "lora{rnk=8}",
    "lora{rank=eight}",
    "lora{rank=1e3}",
    "lora{rank=99999999999999999999}",
    "lora{init=kaimign}",
    "lora{at=attention.qq}",
    'lora{at="attention.q &"}',
    "lora{rank=8",
    "lora{rank=8} ia3{sides=input}",
    "quantise{double=maybe}",
    "ladder_side{keep=[1, two]}",
    "adapter_drop{}",
    "adapter_drop{adapter=pfeiffer{wdth=4}}",
    "unipelt{methods=[lora{rank=2}, perfix{}]}",
    "compacter_pp{widht=8}",
    " , ",
    "{}",
)


def files(path: Path) -> dict[str, str]:
    """Each kind of broken recipe file, and words of its message."""
    written = {
        "syntax.toml": ('[[pass]\nuse = "lora"', "is no TOML"),
        "word.toml": ('[[pass]]\nuse = "lroa"', "number 1: There is no pass 'lroa'. Did you mean 'lora'?"),
        "option.toml": ('[[pass]]\nuse = "ia3"\n[[pass]]\nuse = "lora"\nrakn = 3', "number 2: lora has no option"),
        "kind.toml": ('[[pass]]\nuse = "lora"\nrank = 2.5', "expected a whole number"),
        "table.toml": ('[passes]\nuse = "lora"', "unknown table 'passes'"),
        "spec.txt": ("lora{alhpa=3}", "Did you mean 'alpha'?"),
    }
    for name, (text, _) in written.items():
        (path / name).write_text(text)
    return {str(path / name): words for name, (_, words) in written.items()} | {str(path / "none.toml"): "cannot be"}


def model(path: Path) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"]}))
    return path


def test_a_mistake_on_the_command_line_is_answered_without_torch(tmp_path: Path) -> None:
    source = str(model(tmp_path / "model"))
    (weights := model(tmp_path / "weights")).joinpath("model.safetensors").touch()
    full, taken = str(weights), str(tmp_path / "model")
    calls = [
        (["inspect", str(tmp_path / "no")], "does not exist"),
        (["inspect", source, "--at", "attention.x"], "unknown word 'attention.x'"),
        (["inspect", source, "--explain", "atention.q"], "did you mean 'attention.q'"),
        *((["apply", source, "-r", recipe], words) for recipe, words in files(tmp_path).items()),
        (["apply", source, "-r", "lora{}", "--out", "x"], "contains no weights"),
        (["compare", source, "-r", "lora", "lra"], "There is no pass 'lra'"),
        (["compare", str(tmp_path / "no"), "-r", "lora"], "does not exist"),
        (["export", full, "--out", "x.pt3"], "the suffix says the format"),
        (["export", full, "--out", "x.pt2", "--adapter", "nowhere"], "contains no adapter.json"),
        (["merge", full, "nowhere", "--out", "x"], "contains no adapter.json"),
        (["merge", source, source, "--out", "x"], "contains no weights"),
        (["quantise", full, "--out", "x", "--format", "nf3"], 'format must be "nf4" or'),
        (["quantise", full, "--out", taken], "is not empty"),
    ]
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, json.dumps([arguments for arguments, _ in calls])],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    for (arguments, words), (code, message, loaded) in zip(calls, json.loads(done.stdout), strict=True):
        assert code == 1, arguments
        assert words in message, arguments
        assert loaded == [], arguments


def refusal(read: Callable[[Any], object], recipe: object) -> str:
    with pytest.raises(PeftGraphError) as caught:
        read(recipe)
    return f"{type(caught.value).__name__}: {caught.value}"


@pytest.mark.parametrize("recipe", WRONG)
def test_the_early_refusal_is_the_late_one(recipe: str) -> None:
    assert refusal(check_recipe, recipe) == refusal(pg.load_recipe, recipe)


def test_the_early_refusal_of_a_file_is_the_late_one(tmp_path: Path) -> None:
    for path in files(tmp_path):
        assert refusal(check_recipe, path) == refusal(pg.load_recipe, path)


@pytest.mark.parametrize("word", PASSES.names())
def test_the_source_of_every_pass_says_its_options(word: str) -> None:
    place = PASSES.entry_point(word)
    assert place is not None
    declared, cls = declared_options(*place), find_pass(word)
    assert declared is not None
    known = {one.name: hints(cls)[one.name] for one in fields(cls)}
    assert list(declared.types) == list(known)
    plain = {name: hint for name, hint in known.items() if "Pass" not in str(hint)}
    assert {name: declared.types[name] for name in plain} == plain
    assert all("PassWithin" in str(declared.types[name]) for name in known.keys() - plain.keys())
    for name in [name for name, hint in known.items() if get_origin(hint) is Literal]:
        check_options(word, dict.fromkeys([name], get_args(known[name])[-1]) | given(declared.required))
        early = partial(check_options, word)
        assert refusal(early, {name: "?"}) == refusal(lambda options: cls(**options), {name: "?"})


def given(required: tuple[str, ...]) -> dict[str, object]:
    return dict.fromkeys(required, ())


def test_right_recipes_and_words_alone_pass_the_check() -> None:
    words = ("ia3", "lora; bitfit", "adapter_drop{adapter=pfeiffer layers=1}")
    for recipe in ("lora{}", "lora{rank=4} ia3{}", "adapter_drop{adapter=pfeiffer{width=4} layers=1}", *words):
        check_recipe(recipe)
        load_recipe(recipe)
    with pytest.raises(PeftGraphError, match="cannot be read"):
        check_recipe("ia3.txt")


def test_what_the_source_does_not_say_plainly_is_left_to_the_pass(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "odd_passes.py").write_text(
        "import peftgraph.authoring as own\nfrom peftgraph.authoring import Pass\n"
        "class Plain(Pass):\n    size: int\n    other: 'int | None' = None\n"
        "class Computed(Pass):\n    size: own.Size = 3\n"
        "class Elsewhere(own.Pass):\n    size: int = 3\n"
        "class Inner(Plain):\n    extra: Pass = None\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    plain, inner = declared_options("odd_passes", "Plain"), declared_options("odd_passes", "Inner")
    assert plain is not None
    assert (list(plain.types), plain.required) == (["name", "size", "other"], ("size",))
    assert inner is not None
    assert (inner.types["extra"], inner.required) == (PassWithin, ("size",))
    for name in ("Computed", "Elsewhere", "Missing"):
        assert declared_options("odd_passes", name) is None
    assert declared_options("no_such_module", "Plain") is None
    assert "odd_passes" not in sys.modules


def test_a_pass_of_this_process_is_checked_when_the_recipe_is_read() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Own(Pass):
        word = "early_own"
        size: int = 1

        def rules(self) -> list[Rule]:
            return []

    with temporarily_registered([Own]):
        check_recipe("early_own{sise=1}")
        with pytest.raises(PeftGraphError, match="has no option 'sise'"):
            pg.load_recipe("early_own{sise=1}")
