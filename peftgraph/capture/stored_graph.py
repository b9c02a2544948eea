"""A canonical graph as plain data, and back: what a trace found, apart from the model's own tensors.

Values are not stored: the shapes of the inputs are, in symbols, and the rest is inferred again. What plain data cannot
say (functions of Python, sizes that count values) is not stored.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, free_unbacked_symbols
from torch.utils._sympy.value_ranges import ValueRanges

from peftgraph.ir.graphs import call_nodes
from peftgraph.ir.modes import by_mode
from peftgraph.ir.shape_inference import fake_like, infer_values
from peftgraph.ir.tensor_table import TensorTable

FUNCTIONS = {"operator": operator, "math": math, "torch": torch}  # modules whose functions a graph may call
PLAIN_META = ("label", "default", "training_only", "evaluation_only", "stack_trace", "order")
TORCH_NAMES = (torch.dtype, torch.layout, torch.memory_format)  # print as torch.NAME


class NotStorable(Exception):
    """Something in a program is not plain data; the message says what."""


def dump_graph(graph: fx.Graph) -> dict[str, Any]:
    """Return a graph as JSON data.

    Raises:
        NotStorable: it holds something else.
    """
    return {"nodes": [_dump_node(node) for node in graph.nodes], "symbols": _dump_symbols(graph)}


def load_graph(
    document: Mapping[str, Any], table: TensorTable, inputs: Sequence[Tensor], classes: Mapping[str, type]
) -> fx.Graph:
    """Return the graph of some data.

    Args:
        document: what `dump_graph` returned.
        table: the stored tensors that the graph reads.
        inputs: the tensors of the call that was traced, in the order of the placeholders.
        classes: of the model's modules, by their names.
    """
    graph, known = fx.Graph(), dict[str, fx.Node]()
    for stored in document["nodes"]:
        node = graph.create_node(stored["op"], _load_target(stored["op"], stored["target"]), name=stored["name"])
        if node.name != stored["name"]:
            raise ValueError(f"{stored['name']} became {node.name}")
        node.args = tuple(_load(one, known) for one in stored["args"])
        node.kwargs = {name: _load(one, known) for name, one in stored["kwargs"].items()}
        node.meta = _load_meta(stored["meta"], classes)
        known[node.name] = node
    _give_values(graph, document["symbols"], table, inputs)
    return graph


def _dump_node(node: fx.Node) -> dict[str, Any]:
    value: Any = node.meta.get("val")
    if node.op == "call_function" and free_unbacked_symbols(value):
        raise NotStorable(f"the size that {node.name} counts")
    return {
        "op": node.op,
        "name": node.name,
        "target": _dump_target(node),
        "args": [_dump(one) for one in node.args],
        "kwargs": {name: _dump(one) for name, one in node.kwargs.items()},
        "meta": _dump_meta(node),
    }


def _dump_target(node: fx.Node) -> str:
    target: Any = node.target
    if node.op != "call_function":
        return str(target)
    if isinstance(target, torch._ops.OpOverload):
        return f"op:{target}"
    if target is by_mode:
        return "by_mode"
    for module, home in FUNCTIONS.items():
        name = getattr(target, "__name__", "")
        if getattr(home, name, None) is target:
            return f"{module}:{name}"
    raise NotStorable(f"a call of {target}")


def _load_target(op: str, target: str) -> Any:
    if op != "call_function":
        return target
    if target == "by_mode":
        return by_mode
    kind, _, name = target.partition(":")
    if kind != "op":
        return getattr(FUNCTIONS[kind], name)
    namespace, packet, overload = name.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), packet), overload)


def _dump(value: Any) -> Any:
    """Return an argument as JSON data: what JSON has as it is, all else as {kind: ...}."""
    if value is None or isinstance(value, bool | str) or type(value) is int:
        return value
    if isinstance(value, float):
        return {"float": value.hex()}
    if isinstance(value, complex):
        return {"complex": [value.real.hex(), value.imag.hex()]}
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, TORCH_NAMES):
        return {"torch": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, slice):
        return {"slice": [_dump(one) for one in (value.start, value.stop, value.step)]}
    if isinstance(value, tuple | list):  # in a graph, fx's own immutable list
        return {"tuple" if isinstance(value, tuple) else "list": [_dump(one) for one in value]}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {key: _dump(one) for key, one in value.items()}}
    raise NotStorable(f"an argument of the kind {type(value).__name__}")


def _load(value: Any, nodes: Mapping[str, fx.Node]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "float":
        return float.fromhex(content)
    if kind == "complex":
        return complex(*map(float.fromhex, content))
    if kind == "node":
        return nodes[content]
    if kind == "torch":
        return getattr(torch, content)
    if kind == "device":
        return torch.device(content)
    if kind == "dict":
        return {key: _load(one, nodes) for key, one in content.items()}
    items = [_load(one, nodes) for one in content]
    return slice(*items) if kind == "slice" else tuple(items) if kind == "tuple" else items


def _dump_meta(node: fx.Node) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in node.meta.items():
        if name in PLAIN_META or name == "follows":
            found[name] = _dump(value)
        elif name == "nn_module_stack":
            found[name] = [[key, path, _class_name(cls)] for key, (path, cls) in value.items()]
        elif name != "val":
            raise NotStorable(f"{name!r} at {node.name}")
    return found


def _class_name(cls: object) -> list[str]:
    """Return how a module's class is written in the stack of a node, and its name."""
    return ["class", f"{cls.__module__}.{cls.__qualname__}"] if isinstance(cls, type) else ["name", str(cls)]


def _load_meta(stored: Mapping[str, Any], classes: Mapping[str, type]) -> dict[str, Any]:
    meta = {name: _load(value, {}) for name, value in stored.items() if name != "nn_module_stack"}
    if "nn_module_stack" in stored:
        meta["nn_module_stack"] = {
            key: (path, classes[name] if kind == "class" else name)
            for key, path, (kind, name) in stored["nn_module_stack"]
        }
    return meta


def _dump_symbols(graph: fx.Graph) -> dict[str, Any]:
    """Return the sizes of the inputs, and the smallest and largest value of each symbol among them."""
    sizes: dict[str, list[int | str]] = {}
    ranges: dict[str, list[int | None]] = {}
    for node in graph.nodes:
        if node.op != "placeholder":
            continue
        value = node.meta["val"]
        if not value.is_contiguous():
            raise NotStorable(f"the layout of {node.name}")
        sizes[node.name] = [_size(one, ranges) for one in value.shape]
    return {"sizes": sizes, "ranges": ranges}


def _size(size: int | torch.SymInt, ranges: dict[str, list[int | None]]) -> int | str:
    if isinstance(size, int):
        return size
    symbol = size.node.expr
    if not isinstance(symbol, sympy.Symbol) or free_unbacked_symbols(size):
        raise NotStorable(f"an input's size {symbol}")
    span = size.node.shape_env.var_to_range[symbol]
    ranges[str(symbol)] = [int(end) if end.is_Integer else None for end in (span.lower, span.upper)]
    return str(symbol)


def _give_values(graph: fx.Graph, symbols: Mapping[str, Any], table: TensorTable, inputs: Sequence[Tensor]) -> None:
    """Record the values of all nodes, in place: those of inputs and stored tensors are given, the others inferred."""
    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env, allow_non_fake_inputs=True, export=True)
    sizes: dict[str, torch.SymInt] = {}
    given = iter(inputs)
    for node in graph.nodes:
        if node.op == "placeholder":
            tensor = next(given)
            shape = [
                one if isinstance(one, int) else _symbol(env, sizes, symbols["ranges"], one, tensor.shape[axis])
                for axis, one in enumerate(symbols["sizes"][node.name])
            ]
            with mode:
                node.meta["val"] = torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
        elif node.op == "get_attr":
            node.meta["val"] = fake_like(mode, table[str(node.target)].tensor)
    infer_values(call_nodes(graph), mode)


def _symbol(
    env: ShapeEnv, sizes: dict[str, torch.SymInt], ranges: Mapping[str, Any], name: str, example: int
) -> torch.SymInt:
    """Return a symbolic size of a range, whose value in the example is known; one for each name."""
    if name not in sizes:
        source = ConstantSource(name)
        symbol = env.create_symbol(example, source=source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None)
        assert isinstance(symbol, sympy.Symbol)
        low, high = ranges[name]
        old = env.var_to_range[symbol]
        env.var_to_range[symbol] = old & ValueRanges(
            old.lower if low is None else low, old.upper if high is None else high
        )
        made = env.create_symintnode(symbol, hint=example, source=source)
        assert isinstance(made, torch.SymInt)
        sizes[name] = made
    return sizes[name]
