"""Sizes that a model's code fixes, and branches that it takes by sizes: a call that would go another way is refused."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import peftgraph as pg


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(30, 6), nn.Linear(6, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.work(ids, self.table(ids))

    def work(self, ids: Tensor, x: Tensor) -> Tensor:
        raise NotImplementedError


class Walks(Tokens):
    def work(self, ids: Tensor, x: Tensor) -> Tensor:
        h = torch.zeros_like(x[:, 0])
        for i in range(ids.shape[1]):  # here
            h = torch.tanh(h + x[:, i])
        return self.out(h)


class Divides(Tokens):
    def work(self, ids: Tensor, x: Tensor) -> Tensor:
        return self.out(x).sum(1) / math.log(ids.shape[1])  # here


class Counts(Tokens):
    def work(self, ids: Tensor, x: Tensor) -> Tensor:
        return self.out(x).sum(1) * len(ids[0])  # here


class Views(Tokens):
    def work(self, ids: Tensor, x: Tensor) -> Tensor:
        return self.out(x).view(-1, 7, 5).sum(1)  # here


class Remembers(Tokens):
    """Keeps the mask of its first call."""

    def __init__(self) -> None:
        super().__init__()
        self.mask = torch.ones(7, 7).tril()

    def work(self, ids: Tensor, x: Tensor) -> Tensor:
        return self.mask @ self.out(x)  # here


def ids(batch: int, length: int) -> Tensor:
    return torch.randint(0, 30, (batch, length), generator=torch.Generator().manual_seed(0))


def line_in(cls: type, word: str = "# here") -> str:
    lines, start = inspect.getsourcelines(cls)
    return f"{__file__}:{start + next(i for i, line in enumerate(lines) if word in line)}"


@pytest.mark.parametrize("cls", [Walks, Divides, Counts, Views, Remembers])
def test_a_length_that_the_code_fixes(cls: Callable[[], Tokens]) -> None:
    model = cls().eval()
    program = pg.trace(model, ids(3, 7))
    assert program.signature.describe() == "ids: i64[B, 7]"
    net = program.module().eval()
    torch.testing.assert_close(net(ids(2, 7)), model(ids(2, 7)))
    with pytest.raises(pg.CallError) as caught:
        net(ids(2, 9))
    assert "has size 9 in dimension 1; the model's own code fixes it to 7" in str(caught.value)
    assert f"at {line_in(type(model))}" in str(caught.value)


def test_a_length_that_the_code_leaves_free() -> None:
    class Sums(Tokens):
        def work(self, ids: Tensor, x: Tensor) -> Tensor:
            return self.out(x).sum(1) / ids.shape[1]

    model = Sums().eval()
    program = pg.trace(model, ids(3, 7))
    assert program.signature.describe() == "ids: i64[B, S]"
    torch.testing.assert_close(program.module().eval()(ids(2, 9)), model(ids(2, 9)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_length_that_is_fixed_in_another_dtype(dtype: torch.dtype) -> None:
    class Steps(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return torch.stack([super(Steps, self).forward(input[:, i]) for i in range(input.shape[1])], 1)

    net = pg.trace(Steps(6, 5).to(dtype), torch.ones(3, 7, 6, dtype=dtype)).module()
    with pytest.raises(pg.CallError, match=r"fixes it to 7, at .*test_sizes.py:\d+, in forward: return torch.stack"):
        net(torch.ones(3, 8, 6, dtype=dtype))


class Pads(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        y = super().forward(input)
        if input.shape[1] % 2:  # here
            y = F.pad(y, (0, 0, 0, 1))
        return y.unflatten(1, (-1, 2)).sum(2)


def test_a_branch_by_a_size_is_a_condition_of_every_call() -> None:
    model = Pads(6, 5).requires_grad_(False)
    net = pg.trace(model, torch.ones(3, 7, 6)).module()
    for length in (5, 9):
        x = torch.randn(2, length, 6)
        assert torch.equal(net(x), model(x))
    with pytest.raises(pg.CallError) as caught:
        net(torch.ones(3, 8, 6))
    assert "takes another branch at S = 8 than the one that was traced" in str(caught.value)
    assert f"at {line_in(Pads)}" in str(caught.value)
    even = pg.trace(model, torch.ones(3, 8, 6)).module()
    assert torch.equal(even(torch.ones(3, 4, 6)), model(torch.ones(3, 4, 6)))


def test_a_condition_moves_with_rows_that_a_pass_puts_in_front() -> None:
    condition = pg.trace(Pads(6, 5), torch.ones(3, 7, 6)).signature.conditions[0]
    assert (condition.holds({"S": 7}), condition.holds({"S": 8}), condition.holds({})) == (True, False, True)
    from dataclasses import replace

    moved = replace(condition, offsets=(3,))
    assert (moved.holds({"S": 7}), moved.holds({"S": 8})) == (False, True)


def test_what_a_model_does_at_one_is_tried() -> None:
    class Single(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            y = super().forward(input)
            return y * 2 if input.shape[1] == 1 else y

    class Several(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            y = super().forward(input)
            return y.flip(1) if input.shape[1] > 1 else y  # the same for one

    single, several = (pg.trace(cls(6, 5), torch.ones(3, 7, 6)) for cls in (Single, Several))
    assert (single.signature.ranges["S"][0], several.signature.ranges["S"][0]) == (2, 1)
    assert single.signature.ranges["B"][0] == 1
    with pytest.raises(pg.CallError, match="has size 1 in dimension 1; the model takes at least 2"):
        single.module()(torch.ones(3, 1, 6))
    assert torch.equal(several.module()(X1 := torch.ones(3, 1, 6)), several.module()(X1))


def test_truths_of_sizes_are_arguments_of_operators() -> None:
    class Flags(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            y = super().forward(input)[:, None]
            y = F.scaled_dot_product_attention(y, y, y, is_causal=y.shape[2] > 1)
            return F.dropout(y, 0.1, self.training and input.shape[0] > 0).sum(-1, keepdim=input.shape[1] > 3)

    program = pg.trace(Flags(6, 5).eval(), torch.randn(3, 7, 6))
    assert "is_causal=True" in program.text() or ", True)" in program.text()
    assert program.signature.ranges["S"][0] == 4


@pytest.mark.parametrize("axes", [(1,), (-2,)])
def test_axes_are_fixed_on_request(axes: tuple[int, ...]) -> None:
    program = pg.trace(Pads(6, 5), torch.ones(3, 7, 6), fixed={"input": axes})
    assert program.signature.describe() == "input: f32[B, 7, 6]"
    assert not program.signature.conditions
    with pytest.raises(pg.CallError, match=r"size 9 in dimension 1; it was traced with fixed=\{'input': ...\}, which"):
        program.module()(torch.ones(3, 9, 6))


@pytest.mark.parametrize(
    ("fixed", "words"),
    [({"other": (1,)}, "fixed names 'other', which is no tensor of the example. Its tensors: input"),
     ({"input": (3,)}, r"fixed\['input'\] has the axis 3; input has 3 dimensions")],
)  # fmt: skip
def test_axes_that_are_not_there(fixed: Any, words: str) -> None:
    with pytest.raises(pg.TraceError, match=words):
        pg.trace(Pads(6, 5), torch.ones(3, 7, 6), fixed=fixed)


def test_a_fixed_batch_is_the_examples_own() -> None:
    program = pg.trace(nn.Linear(6, 5), torch.ones(1, 6), fixed={"input": (0,)})
    assert program.signature.describe() == "input: f32[1, 6]"


class Padded(nn.Module):
    """Pads to a multiple of four, where it is asked of a fraction whether that is whole."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.shape[1]
        if not (tokens / 4).is_integer():
            x = nn.functional.pad(x, (0, 0, 0, math.ceil(tokens / 4) * 4 - tokens))
        return self.line(x)


@pytest.mark.parametrize(("traced", "refused"), [(8, 9), (9, 8)])
def test_a_branch_by_a_fraction_is_a_condition(traced: int, refused: int) -> None:
    model = Padded().eval()
    net = pg.trace(model, torch.randn(2, traced, 4)).module().eval()
    x = torch.randn(3, traced + 4, 4)
    torch.testing.assert_close(net(x), model(x), rtol=0, atol=1e-6)
    with pytest.raises(pg.CallError, match="is_integer"):
        net(torch.randn(2, refused, 4))
