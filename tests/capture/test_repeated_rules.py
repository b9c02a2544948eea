"""Shape rules that run once for operands that are alike give the graph that they give when each runs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn import functional as F

import peftgraph as pg
from peftgraph.capture import export_run
from peftgraph.capture.repeated_rules import CallMemory


class Block(nn.Module):
    """Reads sizes of its own results, and writes in place."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.up, self.down, self.norm = nn.Linear(6, 8), nn.Linear(8, 6), nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        h = self.up(self.norm(x)).view(batch, length, 2, 4).transpose(1, 2)
        h = F.relu(h, inplace=True)
        weights = torch.softmax(h @ h.transpose(-1, -2) * 0.5, -1)
        mixed = (weights @ h).transpose(1, 2).reshape(h.shape[0], h.shape[2], -1)
        if self.number % 2:
            mixed = torch.cat([mixed, mixed.flip(1)], 1)[:, : weights.shape[-1]]
        return x + self.down(mixed)


class Stack(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(i) for i in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Skips(nn.Module):
    """Goes back to the sizes of earlier results."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Conv1d(4, 4, 3, padding=1) for _ in range(3))
        self.up = nn.ModuleList(nn.Conv1d(8, 4, 3, padding=1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        kept: list[Tensor] = []
        for conv in self.down:
            x = torch.relu(conv(x))
            kept.append(x)
            x = torch.cat([x, x.mean(-1, keepdim=True)], -1)
        for conv, skip in zip(self.up, reversed(kept), strict=True):
            x = torch.relu(conv(torch.cat([x[..., : skip.shape[-1]], skip], 1)))
        return x.reshape(x.shape[0], -1) * x.shape[-1]


class Chosen(nn.Module):
    """Sizes that count values are new at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        result = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            (rows,) = torch.where(flat[:, i] > 0)
            result = result.index_add(0, rows, expert(flat[rows]))
        return result.view_as(x)


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "stack": (lambda: Stack(4), (3, 5, 6)),
    "skips": (Skips, (3, 4, 11)),
    "chosen": (Chosen, (3, 5, 6)),
}


@pytest.mark.parametrize("case", CASES)
def test_the_program_is_the_one_that_every_rule_gives(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, shape = CASES[case]
    model, x = make(), torch.randn(shape)
    found = pg.trace(model, (x,))
    monkeypatch.setattr(export_run, "rules_run_once", nullcontext)
    monkeypatch.setattr(export_run, "cheap_records", nullcontext)
    wanted = pg.trace(model, (x,), verify="off")
    assert found.text() == wanted.text()
    for kept in ("val", "stack_trace", "nn_module_stack"):
        assert [str(n.meta.get(kept)) for n in found.graph.nodes] == [str(n.meta.get(kept)) for n in wanted.graph.nodes]


def test_more_layers_need_no_more_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    def rules(depth: int) -> int:
        count, rule = 0, FakeTensorMode._dispatch_impl

        def counted(*args: Any) -> Any:
            nonlocal count
            count += torch.compiler.is_exporting()
            return rule(*args)

        with monkeypatch.context() as patched:
            patched.setattr(FakeTensorMode, "_dispatch_impl", counted)
            pg.trace(Stack(depth), (torch.randn(3, 5, 6),), verify="off")
        return count

    assert rules(7) == rules(5) + 2  # of the ReLU, which writes in place


def test_calls_with_numbers_for_sizes_are_remembered_unless_they_write() -> None:
    mode = FakeTensorMode(shape_env=ShapeEnv())
    with mode, torch.no_grad():
        x, y = torch.randn(2, 3), torch.randn(2, 3)
    ran: list[str] = []

    def add(a: Tensor, b: Tensor, *, alpha: float = 1.0) -> Tensor:
        ran.append("add")
        return torch.add(a, b, alpha=alpha)

    def same(a: Tensor) -> Tensor:
        ran.append("same")
        return a

    memory = CallMemory(mode)
    with mode, torch.no_grad():
        first, second = memory.call(add, (x, y), {}), memory.call(add, (y, x), {})
        assert (first.shape, first.dtype) == (second.shape, second.dtype)
        assert first is not second
        memory.call(add, (x, y), {"alpha": 0.5})
        memory.call(add, (x, torch.randn(2, 1)), {})
        assert ran == ["add"] * 3
        assert memory.call(same, (x,), {}) is x
        assert memory.call(same, (y,), {}) is y
        assert memory.call(torch.Tensor.add_, (x, y), {}) is x
        assert memory.call(torch.Tensor.size, (x,), {}) == (2, 3)
    assert ran == ["add"] * 3 + ["same"] * 2
