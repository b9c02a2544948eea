"""Frozen parameters that all sites share: saved with the adapter, or drawn again from a seed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import safetensors.torch
import torch
import zoo
from torch import Tensor, fx

import peftgraph as pg
from peftgraph.authoring import Builder, Match, ParameterValue, Params, Pass, Replace, Rule
from peftgraph.authoring.modules import init
from peftgraph.interop import native
from peftgraph.rewrite.registry import temporarily_registered
from peftgraph.testing import check_pass

F64 = torch.float64
aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class VeRA(Pass):
    """y + b * (d * (x A^T)) B^T; every site reads the first columns of A and rows of B (arXiv 2310.11454)."""

    word = "vera"
    at: pg.Selector = pg.attention.q | pg.ffn.up | pg.ffn.down
    rank: int = 2
    seed: int = 0
    save_projection: bool = True

    def rules(self) -> list[Rule]:
        return [Rule(at=self.at, delta=self.delta, fold=self.fold, max_rank=self.rank)]

    def delta(self, m: Match, op: Builder) -> fx.Node:
        seed = None if self.save_projection else self.seed
        shapes = [one.shape for one in m.related(self.at)]
        a = op.shared_param("vera_A", (self.rank, max(i for _, i in shapes)), init.kaiming, False, seed)
        b = op.shared_param("vera_B", (max(o for o, _ in shapes), self.rank), init.kaiming, False, seed)
        a = op.call(aten.slice.Tensor, a, 1, 0, m.shape[1])
        b = op.call(aten.slice.Tensor, b, 0, 0, m.shape[0])
        scale = op.param("vera_b", (m.shape[0],), init.zeros)
        d = op.param("vera_d", (self.rank,), init.ones)
        return op.mul(m.up(op, op.mul(m.down(op, m.input, a), d), b), scale)

    def fold(self, m: Match, p: Params) -> Mapping[ParameterValue, Tensor]:
        out, inner = m.shape
        change = p.vera_b[:, None] * (p.vera_B[:out] @ (p.vera_d[:, None] * p.vera_A[:, :inner]))
        return {m.weight: m.weight.value + change}


@dataclass(frozen=True, kw_only=True)
class Wrong(VeRA):
    """It shares what cannot be shared, or drawn."""

    word = "wrong"
    mistake: str = ""

    def rules(self) -> list[Rule]:
        port = "input" if self.mistake == "shape" else "output"
        return [Rule(self.at, self.delta, "it is never made", Replace(port))]

    def delta(self, m: Match, op: Builder) -> fx.Node:
        if self.mistake == "shape":
            return op.mul(m.input, op.shared_param("a", (m.shape[1],), init.zeros))
        return op.mul(m.output, op.shared_param("t", (1,), init.zeros, seed=3))


def tuned(**options: bool | int) -> pg.Program:
    return zoo.randomise(zoo.traced("nano", dtype=F64).apply(VeRA(**options)))  # type: ignore[arg-type]


def outputs(program: pg.Program) -> Tensor:
    return program.module().eval()(**zoo.example("nano", 2, 5))["logits"].detach()


@pytest.fixture(autouse=True)
def _known():
    with temporarily_registered([VeRA]):
        yield


@pytest.mark.parametrize("save_projection", [True, False])
def test_the_laws_of_a_pass_with_shared_frozen_matrices(save_projection: bool) -> None:
    assert {"fold", "files", "counts", "training"} <= set(check_pass(VeRA(save_projection=save_projection)))


@pytest.mark.parametrize("save_projection", [True, False])
def test_files_hold_them_or_a_seed(tmp_path: Path, save_projection: bool) -> None:
    program = tuned(save_projection=save_projection, seed=5)
    folder = program.save_adapter(tmp_path / "vera")
    stored = safetensors.torch.load_file(next(folder.glob("*.safetensors")))
    assert {"vera.vera_A", "vera.vera_B"} & stored.keys() == (
        {"vera.vera_A", "vera.vera_B"} if save_projection else set()
    )
    torch.manual_seed(77)
    base = zoo.traced("nano", dtype=F64)
    loaded = base.load_adapter(folder)
    assert loaded.table.hashes() == program.table.hashes()
    renamed = base.load_adapter(folder, name="mine")
    torch.manual_seed(1)
    expected = outputs(program)
    torch.manual_seed(1)
    assert torch.equal(outputs(renamed), expected)
    assert program.count().trainable == sum(value.numel() for value in program.table.trainable.values())
    assert program.count().added - program.count().trainable == 2 * 2 * 80


def test_a_seed_alone_decides_what_is_drawn() -> None:
    torch.manual_seed(0)
    first = tuned(save_projection=False, seed=5)
    torch.manual_seed(9)
    second, other = tuned(save_projection=False, seed=5), tuned(save_projection=False, seed=6)
    names = ("vera.vera_A", "vera.vera_B")
    assert all(torch.equal(first.table[name].tensor, second.table[name].tensor) for name in names)
    assert not any(torch.equal(first.table[name].tensor, other.table[name].tensor) for name in names)
    a, b = (first.table[name].tensor for name in names)
    assert not torch.equal(a.flatten()[:20], b.flatten()[:20])


@pytest.mark.parametrize("save_projection", [True, False])
def test_a_merge_without_the_model_in_memory_is_the_fold(tmp_path: Path, save_projection: bool) -> None:
    program = tuned(save_projection=save_projection)
    folder, base = program.save_adapter(tmp_path / "vera"), zoo.traced("nano", dtype=F64)
    with torch.device("meta"):
        shapes = zoo.build("nano", dtype=F64)
    empty = pg.trace(shapes.to("meta"), {"idx": torch.zeros(2, 5, dtype=torch.long, device="meta")})
    meta, values = native.read(empty, empty.apply, folder, None)
    assert values.keys() >= {"vera.vera_A", "vera.vera_B"}
    assert all(torch.equal(value, program.table[name].tensor) for name, value in values.items())
    assert meta.table.device.type == "meta"
    assert pg.fold(base.load_adapter(folder)).table.hashes() == pg.fold(program).table.hashes()


def test_what_cannot_be_shared_is_refused() -> None:
    base = zoo.traced("nano", dtype=F64)
    with pytest.raises(pg.RecipeError, match=r"its sites share a, and it would be \(48,\) and, at .*, \(80,\)"):
        base.apply(Wrong(mistake="shape", at=pg.ffn.up | pg.ffn.down))
    with pytest.raises(pg.RecipeError, match="t trains, so it cannot be drawn again from a seed"):
        base.apply(Wrong(at=pg.ffn.up))
