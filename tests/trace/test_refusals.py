"""What cannot be traced is refused with the line of the model's own code, the reason, and what to change."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftgraph as pg

X = torch.ones(3, 7, 6)


class Branch(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        y = super().forward(input)
        if y.sum() > 0:  # here
            return y
        return -y


class Number(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        y = super().forward(input)
        return y * float(y.sum())  # here


class Size(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        y = super().forward(input)
        return y[:, : int(y.sum())].reshape(-1, 5)  # here


class Numpy(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(torch.from_numpy(input.numpy() * 2))  # here


class Unequal(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) @ torch.ones(4, 4)  # here


class Noise(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        y = super().forward(input)
        return y + torch.rand_like(y) if self.training else y  # here


class LayerDrop(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            input = input.relu()  # here
        return super().forward(input)


REFUSED = [
    (Branch, "data-dependent", "torch.where"),
    (Number, "data-dependent", "torch.where"),
    (Size, "data-dependent", "torch.where"),
    (Numpy, "numpy", "no graph records"),
    (Unequal, "same reduction dim", "symbolic size"),
    (Noise, "rand_like runs in training only", "rate of 0"),
    (LayerDrop, "relu runs in evaluation only", "rate of 0"),
]


@pytest.mark.parametrize(("cls", "why", "advice"), REFUSED, ids=lambda value: getattr(value, "__name__", ""))
def test_the_line_the_reason_and_the_advice(cls: Any, why: str, advice: str) -> None:
    with pytest.raises(pg.TraceError) as caught:
        pg.trace(cls(6, 5), X)
    message = str(caught.value)
    lines, start = inspect.getsourcelines(cls)
    offset = next(i for i, line in enumerate(lines) if "# here" in line)
    assert f"{cls.__name__} cannot be traced" in message
    assert f"at {__file__}:{start + offset}" in message
    assert lines[offset].strip() in message
    assert re.search(f"why: .*({why})", message)
    assert re.search(f"what to do: .*{re.escape(advice)}", message)


def test_refusals_print_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(pg.TraceError):
        pg.trace(Branch(6, 5), X)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("view", [False, True])
def test_writing_into_an_input(view: bool) -> None:
    class Writes(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            x = input.view(-1, 6) if view else input
            return super().forward(x.mul_(2))

    with pytest.raises(pg.TraceError, match=r"writes into its input 'input' in place \(mul_\).*input.clone\(\)"):
        pg.trace(Writes(6, 5), X)
    assert torch.equal(X, torch.ones(3, 7, 6))


def test_writing_into_a_copy_is_fine() -> None:
    class Copies(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input.clone().mul_(2))

    model = Copies(6, 5)
    assert torch.equal(pg.trace(model, X).module()(X), model(X))


def test_autocast_inside() -> None:
    class Cast(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return super().forward(input)

    with pytest.raises(pg.TraceError, match=r"under torch.autocast\('cpu', torch.bfloat16\), whose casts are no part"):
        pg.trace(Cast(6, 5), X)


def test_an_output_of_an_unknown_class() -> None:
    class Box:
        def __init__(self, value: Tensor) -> None:
            self.value = value

    class Boxes(nn.Linear):
        def forward(self, input: Tensor) -> Any:
            return Box(super().forward(input))

    with pytest.raises(pg.TraceError, match=r"what to do: Return tensors, tuples.*register_dataclass"):
        pg.trace(Boxes(6, 5), X)


def test_stochastic_depth_of_a_library_model() -> None:
    from transformers import SwinConfig, SwinModel

    model = SwinModel(SwinConfig(embed_dim=12, depths=[2], num_heads=[2], image_size=32))
    with pytest.raises(pg.TraceError, match=r"modeling_swin.py:\d+\n.*\n  why: rand runs in training only"):
        pg.trace(model, {"pixel_values": torch.zeros(2, 3, 32, 32)})
