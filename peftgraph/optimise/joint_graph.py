"""Traces the forward and the backward pass of a graph into one graph, by torch's own derivatives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import SymInt, Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.fx.node import map_arg

from peftgraph.ir.dead_code import writes_in_place
from peftgraph.optimise.clean_up import is_view, remove_unused
from peftgraph.optimise.seeded_dropout import DROPOUT, traced_attention, traced_dropout

aten = torch.ops.aten


@torch.library.custom_op("peftgraph::tangent", mutates_args=())
def _tangent(output: Tensor) -> Tensor:
    return torch.empty_like(output, memory_format=torch.contiguous_format)


@_tangent.register_fake
def _(output: Tensor) -> Tensor:
    return torch.empty_like(output, memory_format=torch.contiguous_format)


TANGENT = torch.ops.peftgraph.tangent.default  # stands for the gradient by an output while a joint graph is traced
STAND_INS: dict[Any, Callable[..., Any]] = {
    DROPOUT: traced_dropout,
    aten.scaled_dot_product_attention.default: traced_attention,
}


@dataclass(frozen=True)
class JointGraph:
    """A forward and its backward pass.

    Attributes:
        graph: its placeholders are the inputs of the forward pass, then the gradients by those outputs that have one;
            its outputs are those of the forward pass, then the gradients by the inputs that need one.
        inputs: how many inputs the forward pass has.
        outputs: how many outputs it has.
        differentiable: the positions of the outputs that have a gradient.
        wanted: the positions of the inputs that need a gradient.
        stored: how many of the inputs, the first, are stored tensors.
    """

    graph: fx.Graph
    inputs: int
    outputs: int
    differentiable: tuple[int, ...]
    wanted: tuple[int, ...]
    stored: int


def trace_joint_graph(graph: fx.Graph, values: Sequence[Any]) -> JointGraph:
    """Trace a graph and its derivatives, with sizes that stay free.

    Args:
        graph: its inputs are its stored tensors and then its placeholders, in order; the metadata of both gives the
            symbols of their sizes. It must not write into its inputs.
        values: of those inputs in a call: tensors, whose `requires_grad` says which gradients are wanted, and numbers.
            A size of 1 is fixed, since operators broadcast it.

    Raises:
        Exception: torch cannot trace or differentiate an operation of the graph.
    """
    inputs = [node for op in ("get_attr", "placeholder") for node in graph.nodes if node.op == op]
    mode = FakeTensorMode(shape_env=ShapeEnv())
    mode.cache_enabled = False  # an entry for symbolic sizes costs more than the shape rule that it saves
    fakes = _SymbolicValues(mode, [node.meta["val"] for node in inputs], values).all()
    wanted = tuple(i for i, value in enumerate(values) if isinstance(value, Tensor) and value.requires_grad)
    differentiable: list[int] = []
    count = 0

    def joint(*operands: Any) -> list[Any]:
        nonlocal count
        leaves = [
            one.detach().requires_grad_(i in wanted) if isinstance(one, Tensor) else one
            for i, one in enumerate(operands)
        ]
        outputs = run_graph(graph, inputs, leaves)
        count = len(outputs)
        differentiable.extend(i for i, one in enumerate(outputs) if isinstance(one, Tensor) and one.requires_grad)
        chosen = [outputs[i] for i in differentiable]
        tangents = [TANGENT(one.detach()) for one in chosen]
        with torch.autocast(_device(leaves).type, enabled=False):  # as a backward pass runs
            grads = torch.autograd.grad(chosen, [leaves[i] for i in wanted], tangents, allow_unused=True)
        return [*outputs, *grads]

    detached = [one.detach() if isinstance(one, Tensor) else one for one in fakes]
    with mode, enable_python_dispatcher():
        traced = make_fx(joint)(*detached).graph
    if mode.shape_env is not None and mode.shape_env.guards:
        raise NotImplementedError(f"the derivative holds for some sizes only: {mode.shape_env.guards[0].expr}")
    _tangents_as_inputs(traced)
    stored = sum(node.op == "get_attr" for node in inputs)
    return JointGraph(traced, len(inputs), count, tuple(differentiable), wanted, stored)


def with_gradients_of(joint: JointGraph, wanted: Set[int]) -> JointGraph:
    """Return a copy of a joint graph with the gradients by the inputs at positions `wanted` only."""
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    leaves: Any = graph.graph_copy(joint.graph, made)
    kept = [one for i, one in zip(joint.wanted, leaves[joint.outputs :], strict=True) if i in wanted]
    graph.output([*leaves[: joint.outputs], *kept])
    remove_unused(graph)
    tangents = graph.find_nodes(op="placeholder")[joint.inputs :]
    differentiable = tuple(i for i, one in zip(joint.differentiable, tangents, strict=True) if one.users)
    for one in tangents:
        if not one.users:
            graph.erase_node(one)
    chosen = tuple(i for i in joint.wanted if i in wanted)
    return JointGraph(graph, joint.inputs, joint.outputs, differentiable, chosen, joint.stored)


def _device(values: Sequence[Any]) -> torch.device:
    return next(one.device for one in values if isinstance(one, Tensor))


def _tangents_as_inputs(graph: fx.Graph) -> None:
    """Turn, in place, the calls that stand for gradients by outputs into placeholders, after all others."""
    last = graph.find_nodes(op="placeholder")[-1]
    for node in reversed([node for node in graph.nodes if node.target is TANGENT]):
        with graph.inserting_after(last):
            tangent = graph.placeholder(f"tangent_{node.name}")
        tangent.meta = dict(node.meta)
        node.replace_all_uses_with(tangent)
        graph.erase_node(node)


def run_graph(graph: fx.Graph, inputs: Sequence[fx.Node], values: Sequence[Any]) -> list[Any]:
    """Run a graph on values of its inputs, with stand-ins for what draws random numbers; return its outputs."""
    known: dict[fx.Node, Any] = dict(zip(inputs, values, strict=True))
    place = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if node in known:
            continue
        if node.op == "output":
            return list(map_arg(node.args[0], known.__getitem__))
        args, kwargs = map_arg((node.args, node.kwargs), known.__getitem__)
        target: Any = _functional(node, place) if writes_in_place(node) else node.target
        function: Any = STAND_INS.get(target, target)
        known[node] = function(*args, **kwargs)
    raise AssertionError("a graph without outputs")


def _functional(node: fx.Node, place: Mapping[fx.Node, int]) -> Any:
    """Return the operator that computes what one that writes into its first operand computes.

    Raises:
        NotImplementedError: the overwritten value is read later by other nodes.
    """
    assert isinstance(node.target, torch._ops.OpOverload)
    written = node.args[0]
    assert isinstance(written, fx.Node)
    name = node.target._schema.name.removeprefix("aten::")
    later = [user for one in _same_memory(written) for user in one.users if place[user] > place[node]]
    if later or not name.endswith("_") or not hasattr(aten, name[:-1]):
        raise NotImplementedError(f"{node.name} writes into {written.name}, which is read again")
    return getattr(getattr(aten, name[:-1]), node.target._overloadname)


def _same_memory(value: fx.Node) -> set[fx.Node]:
    """Return a value, what it is a view of, and all other views of that, but for what is written in place."""
    while _is_only_view(value) and isinstance(value.args[0], fx.Node):
        value = value.args[0]
    found, left = set[fx.Node](), [value]
    while left:
        one = left.pop()
        found.add(one)
        left += [user for user in one.users if _is_only_view(user)]
    return found


def _is_only_view(node: fx.Node) -> bool:
    return is_view(node) and not writes_in_place(node)


class _SymbolicValues:
    """Fake tensors and symbolic sizes for the values of a call."""

    def __init__(self, mode: FakeTensorMode, recorded: Sequence[Any], values: Sequence[Any]) -> None:
        self.mode, self.recorded, self.values = mode, recorded, values
        self.symbols: dict[sympy.Expr, int | SymInt] = {}
        self._count = 0

    def all(self) -> list[Any]:
        """Return a fake tensor for each tensor and a symbol for each number."""
        found: list[Any] = []
        for known, value in zip(self.recorded, self.values, strict=True):
            if isinstance(value, Tensor):
                sizes = [self._size(a, b) for a, b in zip(known.shape, value.shape, strict=True)]
                with self.mode:
                    one = torch.empty_strided(
                        sizes, _strides(sizes, stride_order(value)), dtype=value.dtype, device=value.device
                    )
                found.append(one.requires_grad_(value.requires_grad))
            else:
                found.append(self._size(known, value) if type(value) is int else value)
        return found

    def _size(self, known: Any, value: int) -> int | SymInt:
        """Return the size in the joint graph of one that is `known` in the graph, and `value` in this call."""
        if not isinstance(known, SymInt):
            return value
        expression = known.node.expr
        if expression not in self.symbols:
            self.symbols[expression] = self._derived(expression, value) or self._new(value)
        return self.symbols[expression]

    def _derived(self, expression: sympy.Expr, value: int) -> int | SymInt | None:
        """Return an expression of symbols that are known already; None if it has others."""
        symbols: Any = expression.free_symbols
        if expression.is_Symbol or not all(symbol in self.symbols for symbol in symbols):
            return None
        parts: dict[Any, Any] = {one: _expression(self.symbols[one]) for one in symbols}
        derived: Any = expression.xreplace(parts)
        assert self.mode.shape_env is not None
        if not derived.free_symbols:
            return value
        return self.mode.shape_env.create_symintnode(derived, hint=value)

    def _new(self, value: int) -> int | SymInt:
        if value in (0, 1):
            return value
        self._count += 1
        from torch._dynamo.source import ConstantSource  # on first use: importing dynamo takes a while

        environment = self.mode.shape_env
        assert environment is not None
        source = ConstantSource(f"size{self._count}")
        symbol = environment.create_symbol(value, source, DimDynamic.DYNAMIC)
        return environment.create_symintnode(symbol, hint=value)


def _expression(size: int | SymInt) -> sympy.Expr:
    return size.node.expr if isinstance(size, SymInt) else sympy.Integer(size)


def stride_order(value: Tensor) -> tuple[int, ...] | None:
    """Return the axes of a dense tensor from the outermost to the innermost; None if it is contiguous."""
    if value.is_contiguous():
        return None
    return tuple(sorted(range(value.dim()), key=lambda axis: -value.stride(axis)))


def is_dense(value: Tensor) -> bool:
    """Return True if the values of a tensor fill its memory without gaps or repetitions."""
    order = stride_order(value)
    if order is None:
        return True
    return list(value.stride()) == _strides(list(value.shape), order)


def _strides(sizes: Sequence[Any], order: tuple[int, ...] | None) -> list[Any]:
    strides: list[Any] = [1] * len(sizes)
    step: Any = 1
    for axis in reversed(order if order is not None else range(len(sizes))):
        strides[axis] = step
        step = step * sizes[axis]
    return strides
