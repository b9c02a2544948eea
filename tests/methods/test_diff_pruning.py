"""DiffPruning: gates and penalty beside their equations, the choice by magnitude, the sparse file, the exact fold."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import safetensors.torch
import torch
import zoo
from torch import Tensor, nn

import peftgraph as pg
from peftgraph.passes import DiffPruning, LoRA

F64 = torch.float64


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(6, 10), nn.Linear(10, 6), nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.down(torch.relu(self.up(x))))


@pytest.fixture
def base() -> tuple[Block, pg.Program, Tensor]:
    torch.manual_seed(0)
    net, x = Block().to(F64).eval(), torch.randn(3, 4, 6, dtype=F64)
    with torch.no_grad():
        net.up.weight[0, 0] = -0.0
    return net, pg.trace(net, (x,)), x


def train(tuned: pg.Program, x: Tensor, steps: int, until: int | None = None) -> nn.Module:
    net = tuned.module().train()
    run = tuned.training(net, steps=steps)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(until or steps):
        (net(x).square().mean() + run.penalty()).backward()
        optimizer.step()
        run.step()
        optimizer.zero_grad()
    return net


@pytest.mark.parametrize("structured", [True, False])
def test_the_gates_are_those_of_the_paper(structured: bool, base: tuple[Block, pg.Program, Tensor]) -> None:
    net, program, x = base
    tuned = program.apply(DiffPruning(at="ffn.up", structured=structured, penalty=0.5))
    own = {name.rpartition(".")[2]: value for name, value in tuned.table.trainable.items()}
    with torch.no_grad():
        own["diff_w"].normal_()
        for name in own.keys() - {"diff_w"}:
            own[name].normal_()

    def gate(a: Tensor, u: Tensor | None) -> Tensor:
        noise = 0.0 if u is None else torch.log(u) - torch.log(1 - u)
        return (torch.sigmoid(a + noise) * 3 - 1.5).clamp(0, 1)

    def reference(draws: list[Tensor] | None) -> Tensor:
        z = gate(own["diff_a"], draws and draws[0])
        if structured:
            z = z * gate(own["diff_group"], draws and draws[1])
        h = torch.relu(x @ (net.up.weight + z * own["diff_w"]).T + net.up.bias)
        return net.norm(x + h @ net.down.weight.T + net.down.bias)

    module = tuned.module()
    assert float((module.eval()(x) - reference(None)).detach().abs().max()) < 1e-12
    torch.manual_seed(7)
    draws = [torch.rand(10, 6, dtype=F64).clamp(1e-4, 1 - 1e-4), torch.rand(1, dtype=F64).clamp(1e-4, 1 - 1e-4)]
    torch.manual_seed(7)
    got = module.train()(x)
    assert float((got - reference(draws)).detach().abs().max()) < 1e-12
    assert not torch.equal(got, module(x))  # drawn anew
    expected = torch.sigmoid(own["diff_a"] - math.log(1.5 / 1.5)).sum()
    expected = expected * torch.sigmoid(own["diff_group"]).sum() if structured else expected
    assert torch.allclose(tuned.training(module, steps=5).penalty(), 0.5 * expected)


def test_the_largest_differences_stay_and_the_rest_keeps_its_bits(
    base: tuple[Block, pg.Program, Tensor], tmp_path: Path
) -> None:
    _, program, x = base
    method = DiffPruning(target=0.1, final=3, penalty=1e-3)
    tuned = program.apply(method)
    entries = 6 * 10 * 2 + 10 + 6 + 6 + 6
    count = tuned.count()
    assert count.trainable == 2 * entries + 6
    assert count.changed == sum(max(1, int(0.1 * n)) for n in (60, 60, 10, 6, 6, 6))
    train(tuned, x, 8, until=5)
    chosen = {name: value.detach() > 0 for name, value in tuned.table.trainable.items() if name.endswith("diff_a")}
    assert sum(int(one.sum()) for one in chosen.values()) == int(0.1 * entries) == tuned.count().changed
    again = program.apply(method)
    train(again, x, 8)
    assert again.count().changed <= int(0.1 * entries)
    folded = pg.fold(again)
    bits = [
        (folded.table[name].tensor.view(torch.int64) != program.table[name].tensor.view(torch.int64)).sum()
        for name in program.table
    ]
    assert int(sum(bits)) == again.count().changed
    want = again.module().eval()(x)
    assert float((folded.module().eval()(x) - want).detach().abs().max()) < 1e-12
    directory = again.save_adapter(tmp_path / "a")
    stored = safetensors.torch.load_file(str(next(directory.glob("*.safetensors"))))
    assert {name.rpartition(".")[2] for name in stored} == {"diff_values", "diff_places"}
    assert sum(value.numel() for name, value in stored.items() if name.endswith("values")) == int(0.1 * entries)
    back = program.load_adapter(directory)
    assert torch.equal(back.module().eval()(x), want)
    assert back.count().changed == again.count().changed
    named = program.load_adapter(directory, name="dog")
    assert torch.equal(named.module().eval()(x), want)


def test_a_damaged_place_is_refused(base: tuple[Block, pg.Program, Tensor]) -> None:
    _, program, x = base
    tuned = program.apply(DiffPruning(at="ffn.up", target=0.2))
    train(tuned, x, 2)
    method = tuned.history[0].method
    own = {name.rpartition(".")[2]: value.detach() for name, value in tuned.table.trainable.items()}
    packed = dict(method.pack(own))
    assert torch.equal(method.unpack(packed, own)["diff_w"], own["diff_w"])
    packed["diff_places"] = packed["diff_places"] + 60
    with pytest.raises(IndexError):
        method.unpack(packed, own)


def test_words() -> None:
    with pytest.raises(pg.RecipeError, match=r"target must lie in \(0, 1\], got 0"):
        DiffPruning(target=0.0)
    program = zoo.traced("nano").apply(DiffPruning(at="ffn.up", final=4))
    with pytest.raises(pg.RecipeError, match="final=4 leaves none of 4 steps"):
        program.training(program.module(), steps=4)


def test_a_weight_that_another_pass_changes_too_is_counted_once(base: tuple[Block, pg.Program, Tensor]) -> None:
    _, program, _ = base
    alone, low = DiffPruning(at="ffn.up", target=0.1), LoRA(at="ffn.up", rank=1)
    counts = [program.apply(*methods).count().changed for methods in ((alone,), (low,), (alone, low), (low, alone))]
    assert counts[0] < counts[1] == 60
    assert counts[2] == counts[3] == 60
