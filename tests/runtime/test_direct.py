"""Calls of operators as Python code makes them: what the exporter writes, in every form that it writes it in."""

from __future__ import annotations

import torch
from torch import fx, nn

from peftgraph.runtime.direct_calls import call_directly

aten = torch.ops.aten


def called(target: object, *args: object) -> torch.Tensor:
    """What the direct form of a call on a 2 x 3 tensor gives."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(target, (x, *args)))
    call_directly(graph)
    assert not any(isinstance(node.target, torch._ops.OpOverload) for node in graph.nodes)
    return fx.GraphModule(nn.Module(), graph)(torch.arange(6.0).reshape(2, 3).t().t())


def test_a_cast_with_every_argument() -> None:
    for args in ((), (False,), (False, True), (False, False, torch.contiguous_format)):
        found = called(aten.to.dtype, torch.float64, *args)
        assert found.dtype == torch.float64
        assert found.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_a_slice_from_the_end_of_the_last_axis() -> None:
    assert called(aten.slice.Tensor, -1, -2).tolist() == [[1, 2], [4, 5]]
    assert called(aten.slice.Tensor, 1, 0, 2**63 - 1, 2).tolist() == [[0, 2], [3, 5]]
