"""Where a program and its model part: the first value of the graph that the model computes nowhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from peftgraph.capture.diagnosis import line_of_nodes
from peftgraph.ir.graphs import call_nodes
from peftgraph.ir.interpreter import run_in_mode
from peftgraph.ir.modes import evaluation_graph, training_graph
from peftgraph.ir.program import ProgramData

CLOSE = 1e-4  # of the mean magnitude: what two fingerprints of one value may differ by
Fingerprint = tuple[float, ...]


def find_first_difference(
    program: ProgramData, inputs: Sequence[Tensor], training: bool, eager: Callable[[], object]
) -> str:
    """Return the first node whose value differs, and the line of the model's code that it comes from; "" where none is
    found.

    Args:
        program: the program that differs from its model.
        inputs: a call on which it differs.
        training: the mode.
        eager: runs the model on that call.
    """
    seen = _Values()
    with ExitStack() as stack:
        stack.enter_context(_Functions(seen))
        stack.enter_context(_Operators(seen))
        eager()
    known: dict[str, bool] = {}

    def look(node: fx.Node, value: Any) -> None:
        if node.op == "call_function" and isinstance(value, Tensor) and value.is_floating_point():
            known[node.name] = seen.holds(value)

    run_in_mode(program, inputs, training=training, watcher=look)
    graph = (training_graph if training else evaluation_graph)(program.graph)
    for node in call_nodes(graph):
        reads_known = all(known.get(operand.name, True) for operand in node.all_input_nodes)
        if known.get(node.name) is False and reads_known and not any(known.get(user.name) for user in node.users):
            return f"{line_of_nodes([node])}  from %{node.name} = {_name(node)}({', '.join(map(str, node.args))}) on\n"
    return ""


class _Values:
    """Fingerprints of all tensors that a run makes, by shape."""

    def __init__(self) -> None:
        self.by_shape: dict[torch.Size, list[Fingerprint]] = {}

    def add(self, result: Any) -> None:
        for value in pytree.tree_leaves(result):
            if isinstance(value, Tensor) and value.is_floating_point():
                self.by_shape.setdefault(value.shape, []).append(_fingerprint(value))

    def holds(self, value: Tensor) -> bool:
        wanted = _fingerprint(value)
        allowed = CLOSE * max(abs(wanted[0]), 1e-30)
        return any(
            all(a == b or abs(a - b) <= allowed for a, b in zip(wanted, one, strict=True))
            for one in self.by_shape.get(value.shape, ())
        )


class _Functions(TorchFunctionMode):
    def __init__(self, seen: _Values) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunction():
            self.seen.add(result)
        return result


class _Operators(TorchDispatchMode):
    def __init__(self, seen: _Values) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.seen.add(result)
        return result


def _fingerprint(value: Tensor) -> Fingerprint:
    flat = value.detach().double().reshape(-1).nan_to_num(0.0, 1e30, -1e30)
    if not flat.numel():
        return ()
    places = torch.linspace(0, flat.numel() - 1, 5).long()
    weights = torch.cos(torch.arange(flat.numel(), dtype=torch.float64, device=flat.device))
    return (float(flat.abs().mean()), float(flat @ weights / flat.numel()), *flat[places].tolist())


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))
