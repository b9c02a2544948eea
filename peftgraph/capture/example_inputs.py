"""Example inputs: bound to the model's signature and cloned; a batch that looks like no other size."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, count
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from peftgraph.errors import TraceError
from peftgraph.ir.arguments import bind_arguments, leaves_with_keys
from peftgraph.ir.kv_cache import KVCacheSpec

CACHES = ("use_cache", "use_mems")
PRIMES = (3, 5, 7, 11, 13, 17, 19, 23)


@dataclass(frozen=True)
class ExampleLeaf:
    """One leaf of the example: its key, the parameter of `forward` it belongs to, and its value."""

    key: str
    argument: str
    value: Any


@dataclass(frozen=True)
class Example:
    """A call of the model, bound to its signature.

    Attributes:
        forward: the signature of `forward`.
        arguments: the arguments by parameter name; tensors are clones that alias nothing.
        leaves: every leaf of the arguments, in order.
        assumed: arguments that the caller did not give.
        kv_cache: how the model takes keys and values of earlier calls; the argument is a tuple of tensors here.
        defaults: what stands for an argument that a call leaves out, by its name (see `InputSpec.default`).
        fixed: the axes whose sizes stay the example's, by the key of a leaf.
        assume: the truth that tensors have at lines of the model's code.
    """

    forward: inspect.Signature
    arguments: Mapping[str, Any]
    leaves: tuple[ExampleLeaf, ...]
    assumed: frozenset[str] = frozenset()
    kv_cache: KVCacheSpec | None = None
    defaults: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, frozenset[int]] = field(default_factory=dict)
    assume: Mapping[str, bool] = field(default_factory=dict)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensor leaves, in order."""
        return tuple(leaf.value for leaf in self.leaves if isinstance(leaf.value, Tensor))

    def call(self, arguments: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the call `(args, kwargs)` that gives `forward` these arguments, by keyword where possible."""
        parameters = self.forward.parameters.values()
        spread = any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters)
        args: list[Any] = []
        rest = dict(arguments)
        if self.kv_cache is not None:
            rest[self.kv_cache.argument] = self.kv_cache.cache(rest[self.kv_cache.argument])
        for parameter in parameters:
            if parameter.kind is parameter.VAR_POSITIONAL:
                args += rest.pop(parameter.name, ())
                break
            if parameter.name in rest and (spread or parameter.kind is parameter.POSITIONAL_ONLY):
                args.append(rest.pop(parameter.name))
        return tuple(args), rest

    def result(self, output: Any) -> Any:
        """Return the result of a call, with plain tensors in place of a cache, in the order of the cache argument."""
        if self.kv_cache is not None:
            output[self.kv_cache.argument] = tuple(self.kv_cache.read(output[self.kv_cache.argument]))
        return output

    def with_fixed(self, fixed: Mapping[str, Sequence[int]]) -> Example:
        """Return the example with axes whose sizes are part of the program, by the key of an input or its argument's
        name.

        Raises:
            TraceError: there is no such input or axis.
        """
        axes: dict[str, frozenset[int]] = {}
        for name, given in fixed.items():
            leaves = [one for one in self.leaves if name in (one.key, one.argument) and isinstance(one.value, Tensor)]
            if not leaves:
                known = ", ".join(one.key for one in self.leaves if isinstance(one.value, Tensor))
                raise TraceError(f"fixed names {name!r}, which is no tensor of the example. Its tensors: {known}.")
            for leaf in leaves:
                rank = leaf.value.dim()
                wrong = [axis for axis in given if not isinstance(axis, int) or not -rank <= axis < rank]
                if wrong:
                    raise TraceError(f"fixed[{name!r}] has the axis {wrong[0]!r}; {leaf.key} has {rank} dimensions.")
                axes[leaf.key] = axes.get(leaf.key, frozenset()) | {axis % rank for axis in given}
        return replace(self, fixed=axes)

    def with_arguments(self, arguments: Mapping[str, Any]) -> Example:
        """Return the example with other arguments."""
        return replace(self, arguments=arguments, leaves=_leaves(arguments))


def bind_example(model: nn.Module, example: Mapping[str, Any] | tuple[Any, ...] | Tensor) -> Example:
    """Bind `example` to the signature of `model.forward`.

    A transformers model whose `forward` takes `use_cache` (or `use_mems`) is traced without a cache unless the
    example asks for one.

    Raises:
        TraceError: the example does not fit the signature, or holds no tensor.
    """
    args, kwargs = _split(example)
    return bind_call(model, args, kwargs)


def bind_call(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Example:
    """Bind a call with positional and keyword arguments, as `bind_example` does."""
    forward = inspect.signature(model.forward)
    try:
        arguments = bind_arguments(forward, args, kwargs)
    except TypeError as error:
        raise TraceError(f"The example does not fit {type(model).__name__}.forward{forward}: {error}.") from None
    assumed = frozenset(name for name in CACHES if name in forward.parameters and name not in arguments)
    arguments |= dict.fromkeys(assumed, False)
    arguments = {name: pytree.tree_map(_clone, value) for name, value in arguments.items() if value is not None}
    bound = Example(forward, arguments, _leaves(arguments), assumed)
    if not bound.tensors:
        raise TraceError("The example holds no tensor. Pass a dict of keyword inputs or a tuple of positional ones.")
    return bound


def _split(
    example: Mapping[str, Any] | tuple[Any, ...] | Tensor,
) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    if isinstance(example, Tensor):
        return (example,), {}
    if isinstance(example, Mapping):
        return (), example
    if isinstance(example, tuple | list):
        return tuple(example), {}
    raise TraceError(
        "The example must be a dict of keyword inputs, a tuple of positional ones, or a tensor; got "
        f"{type(example).__name__}."
    )


def _clone(value: Any) -> Any:
    # Inputs that alias each other (labels is input_ids) would silently become one input of the graph.
    return value.detach().clone() if isinstance(value, Tensor) else value


def _leaves(arguments: Mapping[str, Any]) -> tuple[ExampleLeaf, ...]:
    return tuple(
        ExampleLeaf(key, name, leaf) for name, value in arguments.items() for key, leaf in leaves_with_keys(name, value)
    )


def with_distinct_batch(example: Example) -> Example:
    """Repeat or cut the batch to a size that no other dimension has.

    A batch of one would be specialised; a batch equal to the length would make two axes look alike. Only when
    all tensors agree on their first dimension is that dimension a batch.
    """
    tensors = example.tensors
    firsts = {tensor.shape[0] for tensor in tensors if tensor.dim() > 0}
    others = {size for tensor in tensors for size in tensor.shape[1:]}
    if len(firsts) != 1 or firsts == {0} or any(0 in axes for axes in example.fixed.values()):
        return example
    (batch,) = firsts
    if batch > 1 and batch not in others:
        return example
    size = next(size for size in chain(PRIMES, count(PRIMES[-1] + 1)) if size not in others)

    def resize(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() == 0:
            return value
        return value.index_select(0, torch.arange(size, device=value.device) % batch)

    arguments = {name: pytree.tree_map(resize, value) for name, value in example.arguments.items()}
    return example.with_arguments(arguments)
