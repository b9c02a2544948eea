"""Conditions on input values that a program assumes and checks at every call (`pg.trace(..., assume=...)`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from peftgraph.errors import CallError


@dataclass(frozen=True, eq=False)
class Assumption:
    """Records a branch of the model's code on tensor values, and the outcome that was traced.

    Attributes:
        location: the line of the model's code, as `assume` spells it: "modeling_esm.py:412".
        expected: the answer.
        source: the line.
        graph: computes the answer from inputs and from `tensors`.
        tensors: the buffers and constants that the graph reads.
    """

    location: str
    expected: bool
    source: str
    graph: fx.Graph
    tensors: Mapping[str, Tensor]

    def holds(self, given: Mapping[str, Tensor | None]) -> bool:
        """Return True if the condition has the traced outcome for these inputs, given by their names in the graph. It
        holds where an input that it depends on is left out, since the branch is then not part of the program."""
        values: dict[fx.Node, Any] = {}
        device = next((value.device for value in given.values() if value is not None), torch.device("cpu"))
        with torch.no_grad():
            for node in self.graph.nodes:
                if node.op == "placeholder":
                    value = given.get(node.name)
                    if value is None:
                        return True
                    values[node] = value
                elif node.op == "get_attr":
                    values[node] = self.tensors[str(node.target)].to(device)
                elif node.op == "output":
                    return bool(values[node.all_input_nodes[0]]) == self.expected
                else:
                    args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
                    assert callable(node.target)
                    values[node] = node.target(*args, **kwargs)
        raise AssertionError("a graph without an output")

    def check(self, given: Mapping[str, Tensor | None]) -> None:
        """Raise an error unless the condition has the traced outcome.

        Raises: CallError: it has another outcome.
        """
        if not self.holds(given):
            raise CallError(
                f"These inputs take another branch than the one that was traced: assume={{{self.location!r}: "
                f"{self.expected}}} does not hold at {self.source!r}. Trace the model again with the other side for "
                "them."
            )

    def __str__(self) -> str:
        return f"{self.location} is {self.expected}: {self.source}"
