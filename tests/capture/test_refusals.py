"""What cannot be traced is refused with the line of the model's own code, the reason, and what to change."""

from __future__ import annotations

import inspect
import random
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
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


class LayerDrop(nn.Linear):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.config = SimpleNamespace(stack_layerdrop=0.1, dropout=0.5, layerdrop_seed=3)
        self.layerdrop = self.config.stack_layerdrop

    def forward(self, input: Tensor) -> Tensor:
        if self.training and torch.rand([]) < self.layerdrop:  # here
            return input[..., :5]
        return super().forward(input)


class PythonNoise(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        y = super().forward(input)
        return y * (random.random() if self.training else 1)  # here


class NumpyNoise(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        y = super().forward(input)
        return y * float(np.random.rand())  # here


class PythonLayerDrop(nn.Linear):
    rate = 0.1

    def forward(self, input: Tensor) -> Tensor:
        skipped = random.uniform(0, 1) < self.rate
        y = super().forward(input)  # here
        return torch.ones_like(y) if self.training and skipped else y


class PythonRate(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(input), random.random(), self.training)  # here


class Mapped(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return torch.vmap(lambda row: row / row.sum())(super().forward(input))  # here


REFUSED = [
    (Branch, "data-dependent", "torch.where"),
    (Number, "data-dependent", "torch.where"),
    (Size, "data-dependent", "torch.where"),
    (Numpy, "numpy", "no graph records"),
    (Unequal, "same reduction dim", "symbolic size"),
    (LayerDrop, "data-dependent", "Set config.stack_layerdrop (0.1) to 0, so that nothing is done at random"),
    (PythonNoise, "draws random numbers with Python or NumPy", "draw them with torch"),
    (NumpyNoise, "draws random numbers with Python or NumPy", "draw them with torch"),
    (PythonLayerDrop, "draws random numbers with Python or NumPy", "draw them with torch"),
    (PythonRate, "draws random numbers with Python or NumPy", "draw them with torch"),
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


def test_numbers_of_python_that_decide_nothing_are_no_reason() -> None:
    layer = PythonLayerDrop(6, 5)
    layer.rate = 0.0
    program = pg.trace(layer, X)
    layer.requires_grad_(False)
    for training in (True, False):
        assert torch.equal(program.module().train(training)(X), layer.train(training)(X))


def test_a_part_under_vmap() -> None:
    with pytest.raises(pg.TraceError) as caught:
        pg.trace(Mapped(6, 5), X)
    line = next(i for i, text in enumerate(inspect.getsourcelines(Mapped)[0]) if "# here" in text)
    assert f"at {__file__}:{inspect.getsourcelines(Mapped)[1] + line}" in str(caught.value)
    assert "under torch.vmap" in str(caught.value)


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
                return super().forward(input)  # here

    words = r"under torch.autocast\('cpu', torch.bfloat16\), whose casts are no part"
    with pytest.raises(pg.TraceError, match=words) as caught:
        pg.trace(Cast(6, 5), X)
    lines, start = inspect.getsourcelines(Cast)
    assert f"at {__file__}:{start + 3}, in forward\n      {lines[3].strip()}\n" in str(caught.value)


def test_an_output_of_an_unknown_class() -> None:
    class Box:
        def __init__(self, value: Tensor) -> None:
            self.value = value

    class Boxes(nn.Linear):
        def forward(self, input: Tensor) -> Any:
            return Box(super().forward(input))

    with pytest.raises(pg.TraceError, match=r"what to do: Return tensors, tuples.*register_dataclass"):
        pg.trace(Boxes(6, 5), X)


def test_random_numbers_of_python_are_left_alone() -> None:
    random.seed(3)
    expected = random.random()
    random.seed(3)
    with pytest.raises(pg.TraceError):
        pg.trace(PythonNoise(6, 5), X)
    assert random.random() == expected


def test_outputs_that_differ_in_the_modes() -> None:
    class Caches(nn.Linear):
        def forward(self, input: Tensor) -> Any:
            y = super().forward(input)
            return {"y": y} if self.training else {"y": y, "cache": input}

    with pytest.raises(pg.TraceError, match=r"outputs differ in training and in evaluation: cache"):
        pg.trace(Caches(6, 5), X)


def test_sizes_that_differ_in_the_modes() -> None:
    class Fixes(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) if self.training else super().forward(input.view(3, -1, 6))

    with pytest.raises(
        pg.TraceError, match=r"takes input: f32\[B, S, 6\] in training and input: f32\[3, S, 6\] in eval"
    ):
        pg.trace(Fixes(6, 5), X)


def test_the_models_line_stands_before_the_one_of_its_library(tmp_path: Path) -> None:
    file = tmp_path / "library.py"
    file.write_text("def positive(x):\n    return x.sum() > 0 or x  # there\n")
    names: dict[str, Any] = {"__name__": f"{__name__.partition('.')[0]}.library"}
    exec(compile(file.read_text(), str(file), "exec"), names)

    class ByLibrary(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return names["positive"](super().forward(input))  # here

    with pytest.raises(pg.TraceError) as caught:
        pg.trace(ByLibrary(6, 5), X)
    message = str(caught.value)
    assert 0 < message.index("# here") < message.index(f"{file}:2, in positive") < message.index("# there")
