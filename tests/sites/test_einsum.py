"""The spelled-out letters of einsum equations."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from peftgraph.sites.dataflow.einsum import letters


def node(equation: str, *shapes: tuple[int, ...]) -> fx.Node:
    graph = fx.Graph()
    inputs = [graph.placeholder(f"x{i}") for i in range(len(shapes))]
    for one, shape in zip(inputs, shapes, strict=True):
        one.meta["val"] = torch.zeros(shape)
    return graph.call_function(torch.ops.aten.einsum.default, (equation, inputs))


@pytest.mark.parametrize(
    ("equation", "shapes", "expected"),
    [
        ("bqd, bkd -> bqk", ((2, 3, 4), (2, 5, 4)), (["bqd", "bkd"], "bqk")),
        ("...qhd,...khd->...hqk", ((9, 2, 3, 6, 4), (9, 2, 5, 6, 4)), (["ABqhd", "ABkhd"], "ABhqk")),
        ("...d,df->...f", ((2, 3, 4), (4, 5)), (["ABd", "df"], "ABf")),
        ("...d,...df->...f", ((2, 3, 4), (3, 4, 5)), (["ABd", "Bdf"], "ABf")),
        ("bd,df", ((2, 4), (4, 5)), (["bd", "df"], "bf")),
        ("fd,bd", ((5, 4), (2, 4)), (["fd", "bd"], "bf")),
    ],
)
def test_letters(equation: str, shapes: tuple[tuple[int, ...], ...], expected: tuple[list[str], str]) -> None:
    found = letters(node(equation, *shapes))
    assert found == expected
    values = [torch.randn(shape) for shape in shapes]
    spelled = ",".join(expected[0]) + "->" + expected[1]
    torch.testing.assert_close(torch.einsum(spelled, values), torch.einsum(equation, values), rtol=0, atol=0)


def test_an_equation_that_is_none() -> None:
    assert letters(node("bd,df,fg->bg", (2, 4), (4, 5))) is None
