"""The rule for an operator's shapes runs once for operands that are alike, while a model is exported.

The layers of a model apply the same operators to operands of the same sizes, and a rule on symbolic sizes costs a
millisecond of algebra. Sizes are alike if they are the same expressions: the result is the same then, as long as
nothing more has become known of the symbols. It is handed out again as an alias, and sizes that the rule made are those
of the new result: code that reads one reads it there, as if the rule had run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_impls import fast_detach
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental import proxy_tensor
from torch.fx.experimental.sym_node import SymNode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

CONSTANTS = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
DEPENDS_ON_VALUES = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.inplace_view)
MADE = "_sizes_made_by_rule"  # attribute of a result: the nodes of the sizes that no operand has
Key = tuple[Any, ...]


class Unlike(Exception):
    """An operand or a result is of a kind that is not remembered."""


@dataclass(frozen=True)
class _Results:
    """What a rule gave: the tensors, the tree they are in, and for each the nodes of the sizes that are new in it."""

    tree: pytree.TreeSpec
    tensors: tuple[FakeTensor, ...]
    made: tuple[frozenset[SymNode], ...]

    def again(self, mode: FakeTensorMode) -> Any:
        aliases: list[FakeTensor] = []
        for tensor, made in zip(self.tensors, self.made, strict=True):
            alias = fast_detach(mode, tensor)
            setattr(alias, MADE, made)
            aliases.append(alias)
        return pytree.tree_unflatten(aliases, self.tree)


class RuleMemory:
    """The results of rules, by operator and operands."""

    def __init__(self) -> None:
        self._found: dict[Key, _Results] = {}

    def run(
        self, rule: Callable[[], Any], mode: FakeTensorMode, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        """Return the result of an operator on fake tensors, by its rule or from memory."""
        env = mode.shape_env
        if env is None or not _is_repeatable(func):
            return rule()
        operands = Operands(mode)
        try:
            operands.add(list(args))
            operands.add([part for item in kwargs.items() for part in item])
        except Unlike:
            return rule()
        key = (func, torch.is_grad_enabled(), torch.get_default_dtype(), _facts(env), *operands.key)
        known = self._found.get(key)
        if known is not None:
            return known.again(mode)
        result = rule()
        if _facts(env) == key[3]:  # the rule has learnt nothing of the sizes
            self._keep(key, result, operands)
        return result

    def _keep(self, key: Key, result: Any, operands: Operands) -> None:
        tensors, tree = pytree.tree_flatten(result)
        try:
            for tensor in tensors:
                operands.check(tensor)
        except Unlike:
            return
        if any(tensor.requires_grad or id(tensor) in operands.tensors for tensor in tensors):
            return
        made = tuple(frozenset(_nodes(tensor) - operands.nodes) for tensor in tensors)
        if not _symbols(set().union(*made)) <= _symbols(operands.nodes):
            return  # a size that counts values is new each time
        self._found[key] = _Results(tree, tuple(fast_detach(operands.mode, one) for one in tensors), made)


class CallMemory:
    """The results of functions of torch on fake tensors whose sizes are numbers, without gradients: by the function and
    what it is given. Only new tensors are remembered; whatever else a function does, it does each time."""

    def __init__(self, mode: FakeTensorMode) -> None:
        self._mode = mode
        self._found: dict[Key, _Results | None] = {}
        self._other: set[Any] = set()  # functions that gave something else than tensors

    def call(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Return what a function gives."""
        operands = Operands(self._mode)
        try:
            if func in self._other or _writes(getattr(func, "__name__", ""), kwargs):
                raise Unlike
            operands.add(list(args))
            operands.add([part for item in kwargs.items() for part in item])
        except Unlike:
            return func(*args, **kwargs)
        settings = (torch.is_grad_enabled(), torch.get_default_dtype(), torch._C._is_any_autocast_enabled())
        key = (func, settings, *operands.key)
        known = self._found.get(key)
        if known is not None:
            return known.again(self._mode)
        result = func(*args, **kwargs)
        if key not in self._found:
            self._found[key] = self._described(func, result, operands)
        return result

    def _described(self, func: Any, result: Any, operands: Operands) -> _Results | None:
        tensors, tree = pytree.tree_flatten(result)
        if not all(type(tensor) is FakeTensor for tensor in tensors):
            self._other.add(func)
            return None
        try:
            for tensor in tensors:
                operands.check(tensor)
        except Unlike:
            return None
        if any(one.requires_grad or id(one) in operands.tensors or _nodes(one) for one in tensors):
            return None
        copies = tuple(fast_detach(operands.mode, one) for one in tensors)
        return _Results(tree, copies, (frozenset(),) * len(tensors))


def _writes(name: str, kwargs: Mapping[str, Any]) -> bool:
    """Tell whether a function writes into what it is given, or only reads an attribute."""
    return name in ("__get__", "__set__", "__setitem__") or "out" in kwargs or (name[-1:] == "_" and name[-2:] != "__")


class Operands:
    """The key of some operands, and the nodes of their symbolic sizes."""

    def __init__(self, mode: FakeTensorMode) -> None:
        self.mode = mode
        self.key: list[Any] = []
        self.nodes: set[SymNode] = set()
        self.tensors: set[int] = set()

    def add(self, value: Any) -> None:
        """Add a value to the key.

        Raises:
            Unlike: it is of another kind.
        """
        kind = type(value)
        if kind is FakeTensor:
            self.check(value)
            self.tensors.add(id(value))
            self.key += (value.dtype, value.fake_device, value.requires_grad, value.dim())
            self._sizes(value.shape, value.stride(), (value.storage_offset(),))
        elif kind in (list, tuple):
            self.key += (kind, len(value))
            for one in value:
                self.add(one)
        elif kind is torch.SymInt:
            self._sizes((value,))
        elif isinstance(value, CONSTANTS):
            self.key += (kind, repr(value) if kind is float else value)  # 0.0 and -0.0 differ
        else:
            raise Unlike

    def check(self, value: Any) -> None:
        """Check that a value is an ordinary fake tensor of this mode, whose elements are unknown."""
        if type(value) is not FakeTensor or value.fake_mode is not self.mode or value.layout is not torch.strided:
            raise Unlike
        if value.constant is not None or value.is_conj() or value.is_neg():
            raise Unlike

    def _sizes(self, *groups: Sequence[int | torch.SymInt]) -> None:
        for size in (one for group in groups for one in group):
            if isinstance(size, torch.SymInt):
                self.nodes.add(size.node)
                self.key.append(size.node.expr)
            else:
                self.key.append(size)


@cache
def _is_repeatable(func: Any) -> bool:
    """Tell whether the result of an operator has sizes that follow from its operands', and nothing is written."""
    if not isinstance(func, torch._ops.OpOverload) or func._schema.is_mutable:
        return False
    return func.namespace in ("aten", "prims") and func not in _LIFTED and not set(DEPENDS_ON_VALUES) & set(func.tags)


_LIFTED = (torch.ops.aten.lift_fresh.default, torch.ops.aten.lift_fresh_copy.default)


def _facts(env: ShapeEnv) -> tuple[int, ...]:
    """Return a number for each kind of facts about symbols; a new fact changes one."""
    return (len(env.guards), *env._get_key())


def _nodes(tensor: torch.Tensor) -> set[SymNode]:
    sizes = (*tensor.shape, *tensor.stride(), tensor.storage_offset(), tensor.numel())
    return {size.node for size in sizes if isinstance(size, torch.SymInt)}


def _symbols(nodes: Iterable[SymNode]) -> set[Any]:
    return {symbol for node in nodes for symbol in node.expr.free_symbols}


@contextmanager
def rules_run_once() -> Iterator[None]:
    """Remember the results of rules while the block runs."""
    memory, impl, track = RuleMemory(), FakeTensorMode._dispatch_impl, proxy_tensor.track_tensor

    def dispatch(mode: FakeTensorMode, func: Any, types: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        return memory.run(lambda: impl(mode, func, types, args, kwargs), mode, func, args, kwargs)

    def tracking(tensor: torch.Tensor, proxy: Any, *, constant: Any, tracer: Any) -> None:
        for node in getattr(tensor, MADE, ()):
            tracer.symnode_tracker.sym_node_dict.pop(node, None)  # it was the size of an earlier result
        track(tensor, proxy, constant=constant, tracer=tracer)

    with ExitStack() as stack:
        stack.enter_context(patch.object(FakeTensorMode, "_dispatch_impl", dispatch))
        stack.enter_context(patch.object(proxy_tensor, "track_tensor", tracking))
        yield
