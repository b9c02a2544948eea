"""Passes of one's own: registered by their word, and held to the laws by `check_pass`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import peftgraph as pg
from peftgraph.authoring import Builder, Match, ParameterValue, Params, Pass, Rule, omit_default
from peftgraph.authoring.modules import LowRank, init
from peftgraph.passes import LoRA, SerialAdapter
from peftgraph.rewrite.registry import temporarily_registered
from peftgraph.testing import LAWS, LawError, check_pass


@dataclass(frozen=True, kw_only=True)
class Path2(Pass):
    """A low-rank path, right but for one mistake."""

    word = "path_two"
    at: pg.Selector = pg.attention.q
    mistake: str = omit_default("")

    def rules(self) -> list[Rule]:
        return [Rule(at=self.at, delta=self.delta, fold=self.fold, max_rank=2)]

    def delta(self, m: Match, op: Builder) -> fx.Node:
        path = LowRank(rank=2)
        up = init.normal(1.0) if self.mistake == "identity" else init.zeros
        a_RI, b_OR = path.factors(m, op, up=up)
        if self.mistake == "gradients":
            a_RI = op.call(torch.ops.aten.detach.default, a_RI)
        if self.mistake == "effect":
            b_OR = op.mul(b_OR, 0.0)
        return path.build(self, m, op, a_RI, b_OR)

    def fold(self, m: Match, p: Params) -> Mapping[ParameterValue, Tensor]:
        return {m.weight: m.weight.value + (2 if self.mistake == "fold" else 1) * p.lora_B @ p.lora_A}

    def __str__(self) -> str:
        return "path_two{at=attention.k}" if self.mistake == "spec" else super().__str__()


def test_a_right_pass_holds_every_law() -> None:
    assert check_pass(Path2()) == LAWS
    with pytest.raises(pg.RecipeError, match="There is no pass 'path_two'"):
        pg.parse_pass("path_two{}")


def test_a_pass_that_does_not_fold_holds_the_others() -> None:
    assert check_pass(SerialAdapter(width=3)) == tuple(law for law in LAWS if law != "fold")


@pytest.mark.parametrize("law", ["spec", "identity", "effect", "gradients", "fold"])
def test_a_mistake_is_told_by_the_law_that_it_breaks(law: str) -> None:
    with pytest.raises(LawError, match=f"path_two.* breaks the law '{law}'") as caught:
        check_pass(Path2(mistake=law))
    assert caught.value.law == law


def test_a_registered_pass_is_read_from_specs_and_adapters(tmp_path: Path) -> None:
    with temporarily_registered([Path2]):
        assert pg.parse_pass("path_two{at=attention.k}") == Path2(at="attention.k")  # pyright: ignore
        assert pg.register(Path2) is Path2
    with pytest.raises(
        pg.RecipeError,
        match=r"Known: .*lora.*entry point of the group .peftgraph\.passes., or at run time \(pg\.register\(MyPass\)\)",
    ):
        pg.parse_pass("path_two{}")


@pytest.mark.parametrize(
    ("word", "message"),
    [("lora", "which is that of peftgraph.passes.lora:LoRA"), ("pipeline", "Pipeline"), ("", "needs a word"),
     ("a b", "needs a word"), ("a{", "needs a word")],
)  # fmt: skip
def test_words_that_are_taken_or_no_words_are_refused(word: str, message: str) -> None:
    made: Any = type("Made", (Path2,), {"word": word})
    with pytest.raises(pg.RecipeError, match=message):
        pg.register(made)


def test_only_passes_are_registered() -> None:
    for wrong in (LoRA(), int, None):
        with pytest.raises(pg.RecipeError, match="takes a class of passes"):
            pg.register(wrong)  # pyright: ignore
    assert pg.register(LoRA) is LoRA
    assert replace(LoRA(), rank=2).rank == 2
