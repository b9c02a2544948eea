"""What surrounds a trace: numbers drawn by Python, threads, classes of outputs, modules of several names, time."""

from __future__ import annotations

import copy
import functools
import logging
import random
import sys
import threading
import warnings
from collections import OrderedDict
from random import getrandbits
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import peftgraph as pg
from peftgraph.capture import slow_warning
from peftgraph.passes.lora import LoRA

X = torch.randn(3, 7, 6, generator=torch.Generator().manual_seed(1))


class Draws(nn.Linear):
    """Draws in ways that no patch of the module `random` would see."""

    kinds = ("a", "b", "c")

    def forward(self, input: Tensor) -> Tensor:
        assert self.kinds[getrandbits(32) % 3] in self.kinds
        assert random.randrange(1) == 0
        random.shuffle(list(self.kinds))
        assert random.gauss(0, 1) is not None
        return super().forward(input)


class Chooses(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        y = super().forward(input)
        return y if getrandbits(8) < 250 else -y


class Picks(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * random.choice((1.0, 1.0, 2.0))


def test_numbers_that_decide_nothing() -> None:
    model = Draws(6, 5).requires_grad_(False)
    state = random.getstate()
    assert torch.equal(pg.trace(model, X).module()(X), nn.Linear.forward(model, X))
    assert random.getstate() == state


@pytest.mark.parametrize("cls", [Chooses, Picks])
def test_numbers_that_decide_something(cls: Any) -> None:
    with pytest.raises(pg.TraceError, match="draws random numbers with Python or NumPy"):
        pg.trace(cls(6, 5), X)


class Branches(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input if input.sum() > 0 else -input)


def shared_state() -> list[Any]:
    """What torch.export and the trace patch."""
    names = ("__bool__", "__gt__", "__eq__")
    symbolic = [getattr(torch.SymInt, name) for name in names] + [torch.SymBool.__bool__]
    generator: Any = random.random.__self__
    kept = [nn.Module.__call__, nn.Module.__getattr__, sys.stderr, sys.stdout, logging.root.manager.disable]
    return [*kept, *symbolic, warnings.showwarning, vars(generator).get("_randbelow"), torch.is_grad_enabled()]


def test_threads_wait_for_each_other_and_leave_nothing_behind() -> None:
    before, found, failed = shared_state(), dict[int, str](), list[Exception]()
    model = nn.Linear(6, 5)

    def work(number: int) -> None:
        try:
            if number == 1:
                pg.trace(Branches(6, 5), X)
            else:
                found[number] = pg.trace(model, X).text()
        except Exception as error:  # looked at below
            failed.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [type(error) for error in failed] == [pg.TraceError]
    assert found[0] == found[2] == pg.trace(model, X).text()
    assert shared_state() == before


class Named(OrderedDict[str, Tensor]):
    @property
    def sample(self) -> Tensor:
        return self["sample"]


class Pair:
    def __init__(self, left: Tensor, right: Tensor) -> None:
        self.left, self.right = left, right


pytree.register_pytree_node(
    Named, lambda one: (list(one.values()), list(one)), lambda v, k: Named(zip(k, v, strict=True))
)
pytree.register_pytree_node(Pair, lambda one: ([one.left, one.right], None), lambda values, _: Pair(*values))


def test_classes_that_are_registered_without_keys() -> None:
    class Outputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(6, 5)

        def forward(self, input: Pair) -> dict[str, Any]:
            y = self.proj(input.left)
            return {"named": Named(sample=y, other=input.right), "pair": Pair(y, y)}

    model = Outputs()
    program = pg.trace(model, (Pair(X, 2 * X),))
    assert [spec.key for spec in program.signature.inputs] == ["input[0]", "input[1]"]
    assert program.signature.output_keys == ("named.sample", "named.other", "pair[0]", "pair[1]")
    out = program.module()(Pair(X, 2 * X))
    assert type(out["named"]) is Named
    assert torch.equal(out["named"].sample, model(Pair(X, X))["pair"].left)


class Table(nn.Module):
    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(20, 6), persistent=False)
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm((x * self.table[: x.shape[1]]).transpose(1, 2)).transpose(1, 2)


class Reads(nn.Module):
    def __init__(self, table: Table) -> None:
        super().__init__()
        self.proj, self.table = nn.Linear(6, 6), table

    def forward(self, x: Tensor) -> Tensor:
        return x + self.proj(self.table(x))


def test_a_module_with_buffers_that_several_layers_hold() -> None:
    table = Table()
    model = nn.Sequential(Reads(table), Reads(table)).requires_grad_(False)
    program = pg.trace(model, X)
    net, plain = program.module(), copy.deepcopy(model)
    for training in (True, False):
        assert torch.equal(net.train(training)(X), plain.train(training)(X))
    assert set(net.state_dict()) == set(model.state_dict())
    assert torch.equal(net.get_buffer("0.table.norm.running_mean"), net.get_buffer("1.table.norm.running_mean"))


def test_a_fold_is_proven_where_integers_become_numbers() -> None:
    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 5)

        def forward(self, step: Tensor) -> Tensor:
            angle = step[:, None] / (torch.arange(2, device=step.device) + 1)  # float32, though no weight is near
            return self.down(torch.relu(self.up(torch.cat([angle.sin(), angle.cos()], -1))))

    program = pg.trace(Steps(), torch.tensor([3, 5, 8])).apply(LoRA(at="projection", rank=2))
    with torch.no_grad():
        for parameter in program.table.trainable.values():
            parameter.normal_()
    proof = pg.fold(program).proof
    assert proof is not None
    assert {probe.dtype for probe in proof.probes} == {"float64", "float32"}


def test_a_slow_trace_says_what_would_make_it_quick(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(slow_warning, "PATIENCE", 0.0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(2))
    told: list[str] = []
    pg.trace(model, torch.randn(2, 3, 9, 9), progress=lambda phase, *_: told.append(phase), verify="off")
    words = "pg.trace(model, example, fixed={'input': (2, 3)})"
    assert sum(words in phase for phase in told) == 1
    pg.trace(nn.Linear(6, 5), X, verify="off")
    assert "peftgraph: exporting in symbolic sizes has taken" in capfd.readouterr().err
    monkeypatch.setattr(slow_warning, "PATIENCE", 60.0)
    pg.trace(nn.Linear(6, 5), X, verify="off")
    assert capfd.readouterr().err == ""


class Remembering(nn.Module):
    """A module whose method is cached by instance, and was called before it is traced."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.ramp = functools.lru_cache(self._ramp)

    def _ramp(self, size: int) -> torch.Tensor:
        return torch.arange(size) * self.linear.weight.detach().new_ones(())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * self.ramp(4)


def test_results_that_a_method_remembers_are_not_shared_with_a_trace() -> None:
    model, x = Remembering().eval(), torch.randn(3, 4)
    expected = model(x)
    for _ in range(2):
        assert torch.equal(pg.trace(model, (x,)).module().eval()(x), expected)
    assert type(model.ramp(4)) is torch.Tensor
    assert torch.equal(model(x), expected)
