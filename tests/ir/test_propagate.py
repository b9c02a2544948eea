"""Shape inference: calls that are alike are run once, and nothing else is shared."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from peftgraph.ir.shape_inference import ShapeInference, same_metadata

aten = torch.ops.aten


class Counted(ShapeInference):
    """Counts the calls that are run."""

    runs = 0

    def _run(self, node: fx.Node) -> object:
        self.runs += 1
        return super()._run(node)


def pair(
    build: Callable[[fx.Graph, fx.Node], fx.Node],
    shapes: tuple[tuple[int, ...], tuple[int, ...]] = ((2, 3), (2, 3)),
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32),
    builds: Callable[[fx.Graph, fx.Node], fx.Node] | None = None,
) -> tuple[int, list[torch.Tensor]]:
    """How many of two calls are run, on one operand each, and what they give."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    graph = fx.Graph()
    inference = Counted(mode)
    values = []
    for shape, dtype, make in zip(shapes, dtypes, (build, builds or build), strict=True):
        operand = graph.placeholder("x")
        with mode:
            operand.meta["val"] = torch.empty(shape, dtype=dtype)
        values.append(inference.value_of(make(graph, operand)))
    return inference.runs, values


def half(graph: fx.Graph, x: fx.Node) -> fx.Node:
    return graph.call_function(aten.mul.Tensor, (x, 0.5))


def test_two_calls_that_are_alike_are_run_once() -> None:
    runs, (first, second) = pair(half)
    assert runs == 1
    assert first is second
    assert first.shape == (2, 3)


def test_other_sizes_and_other_dtypes_are_run_again() -> None:
    runs, (first, second) = pair(half, shapes=((2, 3), (2, 5)))
    assert (runs, tuple(first.shape), tuple(second.shape)) == (2, (2, 3), (2, 5))
    runs, (first, second) = pair(half, dtypes=(torch.float32, torch.float64))
    assert (runs, first.dtype, second.dtype) == (2, torch.float32, torch.float64)


def test_an_integer_factor_is_not_the_equal_float() -> None:
    """An integer tensor times 2 is an integer, times 2.0 a float: 2 == 2.0 must not make them alike."""
    runs, (first, second) = pair(
        lambda graph, x: graph.call_function(aten.mul.Tensor, (x, 2)),
        dtypes=(torch.int64, torch.int64),
        builds=lambda graph, x: graph.call_function(aten.mul.Tensor, (x, 2.0)),
    )
    assert (runs, first.dtype, second.dtype) == (2, torch.int64, torch.float32)


def test_strides_are_part_of_what_is_alike() -> None:
    """The transpose of (3, 2) and a fresh (2, 3) have equal sizes, and only one can be viewed flat."""
    mode = FakeTensorMode()
    graph = fx.Graph()
    inference = Counted(mode)
    fresh, turned = graph.placeholder("fresh"), graph.placeholder("turned")
    with mode:
        fresh.meta["val"], turned.meta["val"] = torch.empty(2, 3), torch.empty(3, 2).t()
    assert inference.value_of(graph.call_function(aten.view.default, (fresh, [6]))).shape == (6,)
    with pytest.raises(Exception, match="view"):
        inference.value_of(graph.call_function(aten.view.default, (turned, [6])))


def test_a_size_that_depends_on_values_is_never_shared() -> None:
    """Two masks of one shape hold different numbers of ones: each result has a size of its own."""
    runs, (first, second) = pair(
        lambda graph, x: graph.call_function(aten.nonzero.default, (x,)), dtypes=(torch.bool, torch.bool)
    )
    assert runs == 2
    assert str(first.shape[0]) != str(second.shape[0])


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("bc,bd->bcd", ((2, 3), (2, 5))),
        ("...c,cd->...d", ((2, 7, 3), (3, 5))),
        ("bc,bd->bcd", ((1, 3), (2, 5))),  # a size of one is broadcast
        ("bc,...bd->...cd", ((2, 3), (4, 2, 5))),
        ("bb->b", ((3, 3),)),
    ],
)
def test_einsum_has_the_shape_that_torch_gives(equation: str, shapes: tuple[tuple[int, ...], ...]) -> None:
    mode = FakeTensorMode(shape_env=ShapeEnv())
    graph = fx.Graph()
    operands = [graph.placeholder(f"x{i}") for i in range(len(shapes))]
    for node, shape in zip(operands, shapes, strict=True):
        node.meta["val"] = mode.from_tensor(torch.empty(shape))
    node = graph.call_function(aten.einsum.default, (equation, operands))
    expected = torch.einsum(equation, *(torch.empty(shape) for shape in shapes)).shape
    assert tuple(ShapeInference(mode).value_of(node).shape) == tuple(expected)


def test_an_einsum_of_sizes_that_differ_is_refused() -> None:
    mode = FakeTensorMode(shape_env=ShapeEnv())
    graph = fx.Graph()
    operands = [graph.placeholder("x"), graph.placeholder("y")]
    for node, shape in zip(operands, ((2, 3), (4, 5)), strict=True):
        node.meta["val"] = mode.from_tensor(torch.empty(shape))
    with pytest.raises(RuntimeError):
        ShapeInference(mode).value_of(graph.call_function(aten.einsum.default, ("bc,cd->bd", operands)))


def test_sizes_that_were_broadcast_to_each_other_are_one() -> None:
    mode = FakeTensorMode(shape_env=ShapeEnv())
    whole, half = (mode.from_tensor(torch.empty(size, 3), static_shapes=False) for size in (14, 7))
    with mode:
        same, other = torch.empty(half.shape[0] * 2, 3), torch.empty(half.shape[0] * 4, 3)
    assert not same_metadata(whole, same)
    assert same_metadata(whole, same, broadcast=True)
    assert not same_metadata(whole, other, broadcast=True)
