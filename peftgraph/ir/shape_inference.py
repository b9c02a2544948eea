"""Infers shapes and dtypes: every node records in `meta["val"]` its value under fake tensors with symbolic sizes."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.fx.node import map_arg


def fake_mode_of(graph: fx.Graph) -> FakeTensorMode:
    """Return the fake mode that the graph's values belong to."""
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return FakeTensorMode(allow_non_fake_inputs=True)


def fake_like(mode: FakeTensorMode, tensor: Tensor) -> Tensor:
    """Return a fake tensor of the same shape, dtype and device."""
    with mode:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device, requires_grad=tensor.requires_grad)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if x.dtype != weight.dtype or (bias is not None and bias.shape != weight.shape[:1]):
        raise RuntimeError(f"linear of {x.dtype} by {weight.dtype}, bias {None if bias is None else tuple(bias.shape)}")
    if x.shape[-1] != weight.shape[-1]:
        raise RuntimeError(f"linear of {x.shape[-1]} features by a weight for {weight.shape[-1]}")
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


# Equations whose result's shape can be read off: letters, after "..." at most in the first operand and the result.
EINSUM = re.compile(r"(\.\.\.)?[a-zA-Z]+(,[a-zA-Z]+)*->(\.\.\.)?[a-zA-Z]*")


def _einsum(equation: str, operands: Sequence[Tensor]) -> Tensor:
    shape = _einsum_shape(equation, operands)
    if shape is None:  # an unusual equation, or sizes that only their values show to be equal
        return torch.ops.aten.einsum.default(equation, operands)
    return operands[0].new_empty(shape)


def _einsum_shape(equation: str, operands: Sequence[Tensor]) -> list[int | torch.SymInt] | None:
    """Derive the shape of the result from the equation; None where that is not possible."""
    if EINSUM.fullmatch(equation) is None:
        return None
    inputs, _, output = equation.partition("->")
    sizes: dict[str, int | torch.SymInt] = {}
    leading: tuple[int | torch.SymInt, ...] = ()
    for term, x in zip(inputs.split(","), operands, strict=True):
        letters = term.removeprefix("...")
        start = x.dim() - len(letters)
        if start < 0 or (start and term == letters) or x.dtype != operands[0].dtype:
            return None
        leading = leading or tuple(x.shape[:start])
        for letter, size in zip(letters, x.shape[start:], strict=True):
            if str(sizes.setdefault(letter, size)) != str(size):
                return None
    kept = leading if output.startswith("...") else ()
    return [*kept, *(sizes[letter] for letter in output.removeprefix("..."))]


# Shape rules of our own, where torch's take a hundred times longer on symbolic sizes: 18 ms for one linear.
SHAPE_RULES: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.aten.linear.default: _linear,
    torch.ops.aten.einsum.default: _einsum,
}


CACHE_ATTRIBUTE = "peftgraph_calls"  # of a fake mode: what calls gave


class ShapeInference:
    """Infers the results of calls under fake tensors, and caches them: of equal calls, as in isomorphic blocks, one
    is run.

    Two calls are equal when their targets and literals are, and their operands have equal sizes (the same
    expressions of the same symbols), strides, dtypes, devices and `requires_grad`. The cache belongs to the fake
    mode, so all programs that come from one trace share it.
    """

    def __init__(self, mode: FakeTensorMode) -> None:
        self.mode = mode
        mode.cache_enabled = False  # torch's own memory of calls doubles their time here
        self._known: dict[Hashable, Any] = vars(mode).setdefault(
            CACHE_ATTRIBUTE, {}
        )  # it holds the mode, and goes with it
        self._descriptions: dict[int, tuple[Any, Hashable]] = {}  # by identity; the value is held so that it keeps it

    def value_of(self, node: fx.Node) -> Any:
        """Infer the result of `node` from its operands' recorded values."""
        if not _is_repeatable(node):
            return self._of_recorded_size(node)
        key = (node.target, self.describe(node.args), self.describe(node.kwargs))
        if key not in self._known:
            self._known[key] = self._run(node)
        return self._known[key]

    def value_with(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        """Infer the result of `node` with other values for some operands."""
        args, kwargs = map_arg(
            (node.args, node.kwargs), lambda operand: values[operand] if operand in values else operand.meta["val"]
        )
        if not _is_repeatable(node):
            return self._call(node.target, args, kwargs)
        key = (node.target, self.describe(args), self.describe(kwargs))
        if key not in self._known:
            self._known[key] = self._call(node.target, args, kwargs)
        return self._known[key]

    def value_of_call(self, target: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Infer the result of a call on values, where no node makes it."""
        key = (target, self.describe(args), self.describe(kwargs))
        if key not in self._known:
            self._known[key] = self._call(target, args, kwargs)
        return self._known[key]

    def _run(self, node: fx.Node) -> Any:
        args, kwargs = map_arg((node.args, node.kwargs), lambda operand: operand.meta["val"])
        return self._call(node.target, args, kwargs)

    def _call(self, target: Any, args: Any, kwargs: Any) -> Any:
        with self.mode, guards_suppressed(self.mode), enable_python_dispatcher():  # its kernels take symbolic sizes
            rule: Any = SHAPE_RULES.get(target, target)
            return rule(*args, **kwargs)

    def _of_recorded_size(self, node: fx.Node) -> Any:
        """Infer the result of `node`, keeping recorded sizes that count values: what the exporter knows of such a size
        is attached to the symbol that it made."""
        known = node.meta.get("val")
        if isinstance(known, torch.SymInt) and free_unbacked_symbols(known):
            return known
        value = self._run(node)
        if not _sizes_by_values(node):
            return value
        if not isinstance(value, Tensor) or not isinstance(known, Tensor) or value.dim() != known.dim():
            return value
        with self.mode, guards_suppressed(self.mode):
            return torch.empty_strided(known.shape, known.stride(), dtype=value.dtype, device=value.device)

    def describe(self, value: Any) -> Hashable:
        """Return a hashable description of an argument, complete for shape inference; a number is paired with its type,
        since 1 == 1.0 == True."""
        if isinstance(value, fx.Node):
            recorded = value.meta["val"]
            if id(recorded) not in self._descriptions:
                self._descriptions[id(recorded)] = (recorded, self.describe(recorded))
            return self._descriptions[id(recorded)][1]
        if isinstance(value, Tensor):
            sizes = tuple(_expression(size) for size in (*value.shape, *value.stride(), value.storage_offset()))
            return ("tensor", value.dim(), sizes, value.dtype, value.device, value.requires_grad)
        if isinstance(value, Mapping):
            return tuple((name, self.describe(item)) for name, item in value.items())
        if isinstance(value, list | tuple):
            return (type(value), tuple(self.describe(item) for item in value))
        if isinstance(value, slice):
            return ("slice", *(self.describe(bound) for bound in (value.start, value.stop, value.step)))
        return (type(value), _expression(value))


def _is_repeatable(node: fx.Node) -> bool:
    """Return True if equal operands give equal sizes: not where sizes depend on values, or operands are written."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return True
    varying = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}
    return not node.target._schema.is_mutable and varying.isdisjoint(node.target.tags)


def _expression(size: Any) -> Hashable:
    return size.node.expr if isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool) else size


@contextmanager
def guards_suppressed(mode: FakeTensorMode) -> Iterator[None]:
    """Prevent shape inference from adding guards on the symbols of the traced graph."""
    env = mode.shape_env
    if env is None:
        yield
        return
    with env.suppress_guards():
        yield


def infer_values(nodes: Iterable[fx.Node], mode: FakeTensorMode) -> None:
    """Recompute `meta["val"]` of every call among `nodes`, in order."""
    inference = ShapeInference(mode)
    for node in nodes:
        if node.op == "call_function":
            node.meta["val"] = inference.value_of(node)


def can_replace_dtype(nodes: Iterable[fx.Node]) -> bool:
    """Return True if `replace_dtype` is valid for `nodes`: only torch's own operators, no size that counts values."""
    return not any("operators" in node.meta or _sizes_by_values(node) for node in nodes)


def _sizes_by_values(node: fx.Node) -> bool:
    varying = isinstance(node.target, torch._ops.OpOverload) and torch.Tag.dynamic_output_shape in node.target.tags
    return varying and "val" in node.meta and bool(free_unbacked_symbols(node.meta["val"]))


def replace_dtype(nodes: Iterable[fx.Node], mode: FakeTensorMode, old: torch.dtype, new: torch.dtype) -> None:
    """Replace dtype `old` by `new` in recorded values. This equals running the calls again, and is much cheaper, where
    every operation accepts `new` and promotes it as it promotes `old`."""
    inference = ShapeInference(mode)
    cast: dict[Hashable, Tensor] = {}

    def value_of(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(value_of(item) for item in value)
        if not isinstance(value, Tensor) or (value.dtype != old and not any(map(_became_number, value.shape))):
            return value
        alike = inference.describe(value)
        if alike not in cast:
            cast[alike] = with_concrete_sizes(mode, value, new if value.dtype == old else value.dtype)
        return cast[alike]

    for node in nodes:
        node.meta["val"] = value_of(node.meta["val"])


def same_metadata(a: Any, b: Any, broadcast: bool = False) -> bool:
    """Return True if two recorded values have the same structure, shapes, dtypes and devices.

    Sizes are equal where their expressions are. With `broadcast` they are also equal where the example's sizes are,
    which are distinct: of two sizes that were broadcast to each other, either may be recorded.
    """
    if a is b:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.device == b.device and _same_shape(a.shape, b.shape, broadcast)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(same_metadata(x, y, broadcast) for x, y in zip(a, b, strict=True))
    return not isinstance(a, Tensor) and not isinstance(b, Tensor)


def _same_shape(a: torch.Size, b: torch.Size, broadcast: bool) -> bool:
    def same(x: int | torch.SymInt, y: int | torch.SymInt) -> bool:
        known = example_size(x) if broadcast else None
        return _expression(x) == _expression(y) or (known is not None and known == example_size(y))

    return len(a) == len(b) and all(map(same, a, b))


def concrete_size(size: int | torch.SymInt) -> int | None:
    """Return a size as a number, also where it is symbolic and was specialised; None where it is free."""
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return int(expression) if expression.is_Integer else None


def with_concrete_sizes(mode: FakeTensorMode, value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a recorded value in another dtype, with plain numbers for symbolic sizes that were specialised."""
    sizes, strides = ([_plain(one) for one in many] for many in (value.shape, value.stride()))
    with mode, guards_suppressed(mode):
        return torch.empty_strided(sizes, strides, dtype=dtype, device=value.device)


def _became_number(size: int | torch.SymInt) -> bool:
    return not isinstance(size, int) and concrete_size(size) is not None


def _plain(size: int | torch.SymInt) -> int | torch.SymInt:
    number = concrete_size(size)
    return size if number is None else number


def example_size(size: int | torch.SymInt) -> int | None:
    """Return a size in the example; None where it counts values."""
    return size if isinstance(size, int) else size.node.hint


def constant_term(size: int | torch.SymInt) -> int:
    """Evaluate a size with every symbol set to 0."""
    return size if isinstance(size, int) else int(size.node.expr.subs(dict.fromkeys(size.node.expr.free_symbols, 0)))
