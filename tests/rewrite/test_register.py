"""Passes of one's own: registered by their word, and held to the laws by `check_pass`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import peftgraph as pg
from peftgraph.authoring import Add, Builder, Match, ParameterValue, Params, Pass, Rule, omit_default
from peftgraph.authoring.modules import LowRank, init
from peftgraph.passes import LoRA, SerialAdapter
from peftgraph.rewrite.registry import temporarily_registered
from peftgraph.testing import LAWS, LawError, SmallModel, check_pass


@dataclass(frozen=True, kw_only=True)
class Path2(Pass):
    """A low-rank path, right but for one mistake."""

    word = "path_two"
    at: pg.Selector = pg.attention.q
    mistake: str = omit_default("")

    def rules(self) -> list[Rule]:
        bound = 1 if self.mistake == "counts" else 2
        join = Leaking() if self.mistake == "gates" else Add()
        return [Rule(at=self.at, delta=self.delta, fold=self.fold, join=join, max_rank=bound)]

    def wrong(self, law: str, m: Match) -> bool:
        """Whether it makes a mistake, in the last layer alone."""
        return self.mistake == law and m.site.layer == 1

    def delta(self, m: Match, op: Builder) -> fx.Node:
        path = LowRank(rank=2)
        up = init.normal(1.0) if self.wrong("identity", m) else init.zeros
        down = self.drawn if self.wrong("determinism", m) else init.kaiming
        a_RI, b_OR = path.factors(m, op, down=down, up=up)
        if self.wrong("gradients", m):
            a_RI = op.call(torch.ops.aten.detach.default, a_RI)
        if self.mistake == "effect":
            b_OR = op.mul(b_OR, 0.0)
        return path.build(self, m, op, a_RI, b_OR)

    def drawn(self, value: Tensor) -> None:
        DRAWS.append(0)
        value.fill_(len(DRAWS))

    def fold(self, m: Match, p: Params) -> Mapping[ParameterValue, Tensor]:
        return {m.weight: m.weight.value + (2 if self.wrong("fold", m) else 1) * p.lora_B @ p.lora_A}

    def pack(self, parameters: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        if self.mistake != "files":
            return parameters
        return {name: value * (1 + 1e-9) for name, value in parameters.items()}

    def __str__(self) -> str:
        return "path_two{at=attention.k}" if self.mistake == "spec" else super().__str__()


DRAWS: list[int] = []


@dataclass(frozen=True)
class Leaking(Add):
    """A join whose gate never shuts."""

    def gate_port(self, m: Match, op: Builder, value: fx.Node, delta: fx.Node, gate: fx.Node) -> fx.Node:
        return op.mul(delta, op.call(torch.ops.aten.clamp.default, gate, 0.1))


def test_a_right_pass_holds_every_law() -> None:
    report = check_pass(Path2())
    assert report.laws == tuple(LAWS)
    assert list(report.held) == ["decoder", "encoder", "encoder_decoder", "vision"]
    assert str(report).splitlines()[:2] == ["path_two{at=attention.q} holds", f"  decoder          {', '.join(LAWS)}"]
    with pytest.raises(pg.RecipeError, match="There is no pass 'path_two'"):
        pg.parse_pass("path_two{}")


def test_a_pass_that_does_not_fold_holds_the_others() -> None:
    report = check_pass(SerialAdapter(width=3), ["decoder", "vision"])
    assert report.laws == tuple(law for law in LAWS if law != "fold")


BROKEN = {
    "spec": ("", "its spec parses to another pass.*Expected path_two{.*}, found path_two{at=attention.k}"),
    "determinism": ("1.attention.q", r"one seed gives two initial values of blocks\.1\.attention\.q\.lora_A"),
    "identity": ("1.attention.q", r"a fresh pass is not the identity.*Expected no difference of the outputs, found \d"),
    "effect": ("", "with random parameters it changes nothing"),
    "gradients": ("1.attention.q", r"blocks\.1\.attention\.q\.lora_A trains, and its gradient is missing"),
    "fold": ("1.attention.q", "differ"),
    "counts": ("0.attention.q", r"of blocks\.0\.attention\.q\.weight has a larger rank .*Expected at most 1, found 2"),
    "gates": ("", r"a gate of 0 does not shut it off.*Expected a difference of the outputs of at most 1e-10, found \d"),
    "files": ("0.attention.q", r"a loaded adapter has other values of blocks\.0\.attention\.q\.lora_A"),
}


@pytest.mark.parametrize("law", BROKEN)
def test_a_mistake_is_told_by_the_law_that_it_breaks(law: str) -> None:
    site, words = BROKEN[law]
    where = f" at {site}" if site else ""
    with pytest.raises(
        LawError, match=f"(?s)^path_two.* breaks the law '{law}' on decoder{where}: .*{words}"
    ) as caught:
        check_pass(Path2(mistake=law), ["decoder"])
    assert (caught.value.law, caught.value.model, caught.value.site) == (law, "decoder", site)


def test_models_of_ones_own() -> None:
    own = SmallModel("mlp", nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)), {"input": torch.randn(4, 5)})
    everywhere = LoRA(at="linear", rank=2)
    assert list(check_pass(everywhere, [own]).held) == ["mlp"]
    report = check_pass(LoRA(rank=2), [own, "encoder"])
    assert list(report.held) == ["encoder"]
    assert "mlp      does not apply: attention.q|attention.v: 0 sites" in str(report)
    with pytest.raises(pg.NoMatch, match="0 sites"):
        check_pass(LoRA(rank=2), [own])
    with pytest.raises(pg.PeftGraphError, match="no built-in model 'gpt'; there are decoder, encoder"):
        check_pass(LoRA(rank=2), ["gpt"])


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
    with temporarily_registered([]):
        assert pg.register(LoRA) is LoRA
    assert replace(LoRA(), rank=2).rank == 2
