"""Branches by the values of tensors, of which the caller says the side: `pg.trace(..., assume={"model.py:12": False})`.

The truth that such a line asks for becomes an output of the graph that is exported, and from there a graph of its own,
which every call runs first.
"""

from __future__ import annotations

import linecache
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from types import FrameType
from typing import Any

from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from peftgraph.capture.diagnosis import is_model_code
from peftgraph.errors import TraceError
from peftgraph.ir.assumption import Assumption
from peftgraph.ir.dead_code import remove_dead_nodes
from peftgraph.ir.graphs import stored_tensor_nodes
from peftgraph.ir.tensor_table import TensorEntry

ASKING = {"__bool__", "item"}


class AssumptionRecorder(TorchFunctionMode):
    """Answers the truth of tensors at the lines that `sides` names, and keeps what was asked.

    Attributes:
        asked: the tensors, each with its key of `sides`, the side, and the source of the line.
    """

    def __init__(self, sides: Mapping[str, bool]) -> None:
        super().__init__()
        self.sides = sides
        self.asked: list[tuple[Tensor, str, bool, str]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.sides and getattr(func, "__name__", "") in ASKING and args[0].numel() == 1:
            place = _place(sys._getframe(1))
            key = next((key for key in self.sides if place is not None and _names(key, *place)), None)
            if key is not None and place is not None:
                source = linecache.getline(*place).strip()
                self.asked.append((args[0], key, self.sides[key], source))
                return self.sides[key]
        return func(*args, **(kwargs or {}))

    def answers(self) -> list[Tensor]:
        """Return the conditions that were evaluated, as tensors of the graph."""
        return [value != 0 for value, *_ in self.asked]


def extract_assumptions(
    graph: fx.Graph, asked: Sequence[tuple[Any, str, bool, str]], entries: Mapping[str, TensorEntry]
) -> tuple[Assumption, ...]:
    """Turn the last outputs of a canonical graph, in place, into assumptions, one each.

    Raises:
        TraceError: one depends on weights, which passes change.
    """
    if not asked:
        return ()
    output = graph.output_node()
    leaves = list(output.args[0])  # pyright: ignore[reportArgumentType]
    answers = leaves[len(leaves) - len(asked) :]
    found: dict[tuple[str, str], Assumption] = {}
    for answer, (_, place, side, source) in zip(answers, asked, strict=True):
        own = _above(answer)
        read = [str(node.target) for node in stored_tensor_nodes(own)]
        weights = [name for name in read if entries[name].kind == "parameter"]
        if weights:
            raise TraceError(
                f"assume={{{place!r}: {side}}} speaks of a truth that depends on the weights ({weights[0]}), which "
                "passes change. Only what depends on inputs alone can be assumed."
            )
        tensors = {name: entries[name].tensor for name in read}
        found.setdefault((place, str(own)), Assumption(place, side, source, own, tensors))
    output.args = (leaves[: len(leaves) - len(asked)],)
    remove_dead_nodes(graph)
    return tuple(found.values())


def require_all_used(sides: Mapping[str, bool], found: Iterable[Assumption]) -> None:
    """Check that every assumed branch was reached.

    Raises:
        TraceError: one was not.
    """
    unused = set(sides) - {one.location for one in found}
    if unused:
        raise TraceError(
            f"assume names {min(unused)!r}, but no tensor's truth is asked for at such a line. Name the file and the "
            'line of the branch, as the error without `assume` shows them: {"model.py:12": False}.'
        )


def _above(answer: fx.Node) -> fx.Graph:
    """Return a graph of a value's ancestors."""
    wanted: set[fx.Node] = set()
    todo = [answer]
    while todo:
        node = todo.pop()
        if node not in wanted:
            wanted.add(node)
            todo += node.all_input_nodes
    new, values = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in answer.graph.nodes:
        if node in wanted:
            values[node] = new.node_copy(node, values.__getitem__)
    new.output(values[answer])
    return new


def _place(frame: FrameType | None) -> tuple[str, int] | None:
    while frame is not None and not is_model_code(frame.f_code.co_filename):
        frame = frame.f_back
    return None if frame is None else (frame.f_code.co_filename, frame.f_lineno)


def _names(key: str, file: str, line: int) -> bool:
    """Tell whether a key, the end of a path and a line number, names a line of a file."""
    name, _, number = key.rpartition(":")
    parts = PurePath(name).parts
    return number == str(line) and bool(parts) and PurePath(file).parts[-len(parts) :] == parts
