"""A program is compared with its model as it is traced: what differs is refused, and what was compared is told."""

from __future__ import annotations

import inspect
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import peftgraph as pg

X = torch.randn(3, 7, 6, generator=torch.Generator().manual_seed(1))
exporting = torch.compiler.is_exporting


class Layer(nn.Linear):
    def __init__(self) -> None:
        super().__init__(6, 5)

    def forward(self, input: Tensor) -> Tensor:
        return self.after(super().forward(input), input)  # here

    def after(self, y: Tensor, x: Tensor) -> Tensor:
        raise NotImplementedError


class Always(Layer):
    """Another function while it is exported, as code that asks whether it is traced."""

    def after(self, y: Tensor, x: Tensor) -> Tensor:
        y = torch.relu(y)
        return y * 2 if exporting() else y * 3


class Longer(Layer):
    def after(self, y: Tensor, x: Tensor) -> Tensor:
        return y * 2 if not exporting() and x.shape[1] > 9 else y


class Training(Layer):
    def after(self, y: Tensor, x: Tensor) -> Tensor:
        return y * 2 if self.training and not exporting() else y


class Shape(Layer):
    def after(self, y: Tensor, x: Tensor) -> Tensor:
        return y if exporting() else y[..., :3]


class Statistics(Layer):
    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(5))

    def after(self, y: Tensor, x: Tensor) -> Tensor:
        if self.training:
            self.mean.mul_(0.5 if exporting() else 0.9)
        return y + self.mean


@pytest.mark.parametrize(
    ("cls", "words"),
    [
        (Always, "In evaluation at input 3x7x6 output is another, by .* of its largest value"),
        (Longer, "In evaluation at input 2x11x6 output is another"),
        (Training, "In training at input 3x7x6 output is another"),
        (Shape, r"output is f32\[3, 7, 5\] instead of f32\[3, 7, 3\]"),
    ],
)
def test_a_program_that_is_not_its_model_is_refused(cls: Any, words: str) -> None:
    with pytest.raises(pg.TraceError, match=words) as caught:
        pg.trace(cls(), X)
    assert f"{cls.__name__} cannot be traced: the program that comes of it is not the model" in str(caught.value)
    assert pg.trace(cls(), X, verify="off").comparison is None


def test_the_first_value_that_differs_is_named_with_its_line() -> None:
    with pytest.raises(pg.TraceError) as caught:
        pg.trace(Always(), X)
    lines, start = inspect.getsourcelines(Layer)
    line = start + next(i for i, text in enumerate(lines) if "# here" in text)
    assert f"at {__file__}:{line}, in forward\n" in str(caught.value)
    assert "from %mul = mul.Tensor(relu, 2) on" in str(caught.value)


def test_buffers_that_training_writes_are_compared() -> None:
    model = Statistics()
    model.mean.fill_(1.0)
    with pytest.raises(pg.TraceError, match="In training .* the buffer mean afterwards is another|output is another"):
        pg.trace(model, X)


def test_levels() -> None:
    assert pg.trace(Longer(), X, verify="example").comparison.runs == (  # pyright: ignore[reportOptionalMemberAccess]
        "evaluation at input 3x7x6",
        "training at input 3x7x6",
    )
    with pytest.raises(pg.TraceError, match='verify must be "off", "example" or "sizes", got True'):
        pg.trace(Longer(), X, verify=True)  # pyright: ignore[reportArgumentType]


class Masks(nn.Linear):
    """Leaves a mask out that hides nothing, but not while it is exported; without it, something else happens."""

    def forward(self, input: Tensor, mask: Tensor) -> Tensor:
        y = super().forward(input)
        if not exporting() and bool(mask.all()):
            return y.flip(1)
        return y * mask[..., None]


def test_masks_that_hide_nothing_are_tried_where_the_example_hides_something() -> None:
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[1, 4:] = 0
    with pytest.raises(pg.TraceError, match="In evaluation at input 3x7x6, mask 3x7 with mask all 1 output is another"):
        pg.trace(Masks(6, 5), (X, mask))
    with pytest.raises(pg.TraceError, match="In evaluation at input 3x7x6, mask 3x7 output is another"):
        pg.trace(Masks(6, 5), (X, torch.ones_like(mask)))


def test_the_evidence() -> None:
    class Masked(Masks):
        def forward(self, input: Tensor, mask: Tensor) -> Tensor:
            return nn.Linear.forward(self, input) * mask[..., None]

    program = pg.trace(Masked(6, 5), (X, torch.ones(3, 7, dtype=torch.bool)))
    assert str(program.comparison).splitlines() == [
        "equal to the model: evaluation at input 3x7x6, mask 3x7",
        "equal to the model: training at input 3x7x6, mask 3x7",
        "equal to the model: evaluation at input 3x7x6, mask 3x7 with other values at the end of mask",
        "equal to the model: evaluation at input 2x11x6, mask 2x11",
        "equal to the model: training at input 2x11x6, mask 2x11",
        "equal to the model: evaluation at input 1x1x6, mask 1x1",
    ]
    assert str(program).endswith("no passes; equal to the model in 6 runs when it was traced")


def test_sizes_that_the_model_does_not_take() -> None:
    class Positions(Layer):
        limits = (1, 7)

        def after(self, y: Tensor, x: Tensor) -> Tensor:
            if not exporting() and not self.limits[0] <= x.shape[1] <= self.limits[1]:
                raise IndexError("no such position")
            return y

    assert "evaluation at input 2x5x6" in pg.trace(Positions(), X).comparison.runs  # pyright: ignore
    model = Positions()
    model.limits = (7, 7)
    checked = pg.trace(model, X).comparison
    assert checked is not None
    assert checked.skipped == ("other sizes: at those that were tried the model raises IndexError: no such position",)
    model.limits = (8, 9)
    with pytest.raises(pg.TraceError, match=r"cannot be run on the example.*IndexError: no such position"):
        pg.trace(model, X)


def test_what_rounding_makes_is_no_difference() -> None:
    class Rounds(Layer):
        def after(self, y: Tensor, x: Tensor) -> Tensor:
            return (y - 3000.0) + 3000.0 if exporting() else (y + 3000.0) - 3000.0

    program = pg.trace(Rounds(), X)
    assert not torch.allclose(program.module()(X), Rounds.forward(Rounds(), X))


def test_without_weights_sizes_are_compared() -> None:
    with torch.device("meta"):
        layer, wrong, x = nn.Linear(6, 5), Shape(), torch.empty(3, 7, 6)
    checked = pg.trace(layer, x).comparison
    assert checked is not None
    assert (checked.values, checked.runs) == (False, ("evaluation at input 2x11x6", "training at input 2x11x6"))
    assert str(checked).startswith("of the model's sizes: evaluation at")
    with pytest.raises(pg.TraceError, match=r"output is f32\[2, 11, 5\] instead of f32\[2, 11, 3\]"):
        pg.trace(wrong, x)


def test_nothing_is_left_of_it() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.5), nn.BatchNorm1d(5), nn.Linear(5, 5)).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    expected = (random.random(), np.random.rand(), torch.rand(1))
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    pg.trace(model, X[:, 0])
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


# The marker in the place of the model's dtype must not choose a branch.


class FullPrecision(Layer):
    def after(self, y: Tensor, x: Tensor) -> Tensor:
        return y / (y.norm(dim=-1, keepdim=True) + (1e-6 if y.dtype == torch.float32 else 0.1))


class HalfPrecision(Layer):
    def after(self, y: Tensor, x: Tensor) -> Tensor:
        return y.clamp(-0.1, 0.1) if y.dtype in (torch.float16, torch.bfloat16) else y


class Limits(Layer):
    def after(self, y: Tensor, x: Tensor) -> Tensor:
        return y / (y.abs() + torch.finfo(y.dtype).eps * 64)


class Follows(Layer):
    """What follows the dtype in the ways that are known is marked."""

    def after(self, y: Tensor, x: Tensor) -> Tensor:
        wide = y.float().softmax(-1)
        wide = wide.to(y.dtype) if wide.dtype != y.dtype else wide
        return wide.masked_fill(y > 0, torch.finfo(y.dtype).min) + torch.zeros(5, dtype=y.dtype)


@pytest.mark.parametrize(
    ("cls", "marked"), [(FullPrecision, False), (HalfPrecision, True), (Limits, False), (Follows, True)]
)
def test_code_that_branches_on_the_dtype_runs_its_own_branch(cls: Any, marked: bool) -> None:
    model = cls().requires_grad_(False)
    program = pg.trace(model, X, verify="off")
    assert program.can_change_dtype is marked
    assert torch.equal(program.module()(X), model(X))


# What surrounds the call is not part of the program.


def test_ambient_modes() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 6)).requires_grad_(False)
    text = pg.trace(model, X).text()
    with torch.no_grad():
        assert pg.trace(model, X).text() == text
    with torch.autocast("cpu", dtype=torch.bfloat16):
        program = pg.trace(model, X)
        assert program.text() == text
        assert program.module()(X).dtype == model(X).dtype == torch.bfloat16
        assert torch.is_autocast_enabled("cpu")
        assert torch.equal(program.module()(X), model(X))


def test_weights_of_two_dtypes() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(6, 8).half(), nn.Linear(8, 6)

        def forward(self, x: Tensor) -> Tensor:
            y = F.gelu(self.up(x))
            return x + self.down(y.to(self.down.weight.dtype) if y.dtype != self.down.weight.dtype else y).to(x.dtype)

    model, x = Mixed().requires_grad_(False), X.half()
    program = pg.trace(model, x)
    assert not program.can_change_dtype
    assert torch.equal(program.module()(x), model(x))
