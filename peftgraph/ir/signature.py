"""The calling convention of a program: the model's own signature, the arguments of the trace, and the output tree."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from peftgraph.errors import CallError
from peftgraph.ir.arguments import bind_arguments, leaves_with_keys
from peftgraph.ir.assumption import Assumption
from peftgraph.ir.dtypes import dtype_kind, short_dtype
from peftgraph.ir.kv_cache import KVCacheSpec

# What the printed form of an expression over sizes may call.
EXPRESSION_NAMES = {"math": math, "torch": torch, "max": max, "min": min, "abs": abs, "round": round}
FIXED_BY_CALLER = "fixed="  # in the place of a line: who called for the trace fixed the size


@dataclass(frozen=True)
class SizeCondition:
    """Describes a condition on the sizes of every call, because the model's code branches on it.

    Attributes:
        code: an expression of Python over names of sizes.
        sizes: the names in it.
        location: the line of the model's code.
        offsets: by how much passes make the sizes larger on their way to that line.
    """

    code: str
    sizes: tuple[str, ...]
    location: str
    offsets: tuple[int, ...] = ()

    def holds(self, sizes: Mapping[str, int]) -> bool:
        """Return True if the condition holds for `sizes`, or depends on a size that is not among them."""
        if any(name not in sizes for name in self.sizes):
            return True
        more = self.offsets or (0,) * len(self.sizes)
        return _holds(self.code, tuple((name, sizes[name] + n) for name, n in zip(self.sizes, more, strict=True)))


@lru_cache(maxsize=4096)
def _holds(code: str, sizes: tuple[tuple[str, int], ...]) -> bool:
    return bool(eval(code, {"__builtins__": {}, **EXPRESSION_NAMES}, dict(sizes)))


@dataclass(frozen=True)
class InputSpec:
    """Describes one tensor input of the graph.

    Attributes:
        name: the placeholder's name in the graph.
        key: the argument as the model's signature spells it, with a path when nested: `past[0]`.
        argument: the name of the parameter of `forward` it belongs to.
        dtype: what it was traced with; another dtype of the same kind (integer, floating, bool) is accepted.
        dims: one entry a dimension: an int that the model's own code fixed, or a symbol's name.
        optional: whether `forward` has a default for it.
        default: what stands for it in a call that leaves it out, by name (see `default_input`); None: nothing.
        fixed: what fixed the dimensions that are numbers: by dimension, a line of the model's code or FIXED_BY_CALLER.
        fill: the value of all entries in a call that leaves it out, for an input that was added; None: nothing.
        added: whether it is no input of the model's own.
    """

    name: str
    key: str
    argument: str
    dtype: torch.dtype
    dims: tuple[int | str, ...]
    optional: bool
    default: str | None = None
    fixed: Mapping[int, str] = field(default_factory=dict)
    fill: float | None = None
    added: bool = False

    def describe(self) -> str:
        """Format the input: `attention_mask?: i64[B, S]`."""
        return f"{self.key}{'?' if self.optional else ''}: {_shape_text(self)}"


@dataclass(frozen=True)
class Signature:
    """Describes how a program is called, and checks calls.

    Attributes:
        forward: the signature of the traced model's `forward`.
        inputs: the tensor inputs, in placeholder order.
        constants: the values of the other arguments given when tracing, by key.
        ranges: smallest and largest size of each symbol that the model's code allows.
        outputs: the tree of the outputs.
        output_keys: one readable name for each leaf of the outputs, such as `logits`.
        assumed: constants that hold though the caller did not give them.
        kv_cache: how keys and values of earlier calls are taken and given, by a program that was traced with them.
        conditions: what holds of the sizes of every call beside that.
        assumptions: what holds of its values.
    """

    forward: inspect.Signature
    inputs: tuple[InputSpec, ...]
    constants: Mapping[str, Any]
    ranges: Mapping[str, tuple[int, int | None]]
    outputs: pytree.TreeSpec
    output_keys: tuple[str, ...]
    assumed: frozenset[str] = frozenset()
    kv_cache: KVCacheSpec | None = None
    conditions: tuple[SizeCondition, ...] = ()
    assumptions: tuple[Assumption, ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Signature:
        return self  # a value: copies of a module share it

    @property
    def cache_inputs(self) -> frozenset[str]:
        """Returns the names of the inputs that are cached keys and values."""
        return frozenset(
            s.name for s in self.inputs if self.kv_cache is not None and s.argument == self.kv_cache.argument
        )

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor | None]:
        """Return the tensors of a call in placeholder order; None for an optional input that is left out.

        Raises:
            CallError: an argument is unknown, missing, of another kind of dtype, or of a shape the graph does not take.
        """
        try:
            arguments = bind_arguments(self.forward, args, kwargs)
        except TypeError as error:
            raise CallError(f"{error}. The model's signature is forward{self.forward}.") from None
        return self.tensors_of(arguments)

    def tensors_of(self, arguments: Mapping[str, Any]) -> list[Tensor | None]:
        """Do the same as `bind` for arguments by name; None also for cached keys and values.

        Raises:
            CallError: as `bind` does.
        """
        given: dict[str, Any] = {}
        for name, value in arguments.items():
            if isinstance(value, Tensor):
                given[name] = value
            else:
                given |= dict(leaves_with_keys(name, value))
        tensors = self._filled([given.pop(spec.key, None) for spec in self.inputs])
        self._check_constants(given)
        self._check_tensors(tensors)
        for one in self.assumptions:
            one.check(dict(zip((spec.name for spec in self.inputs), tensors, strict=True)))
        return tensors

    def _filled(self, tensors: list[Any]) -> list[Any]:
        """Return the tensors of a call with the values of omitted inputs that have one for all entries."""
        if all(spec.fill is None or value is not None for spec, value in zip(self.inputs, tensors, strict=True)):
            return tensors
        present = [(spec, x) for spec, x in zip(self.inputs, tensors, strict=True) if isinstance(x, Tensor)]
        sizes = {dim: n for spec, x in present for dim, n in zip(spec.dims, x.shape, strict=False)}
        device = present[0][1].device if present else None

        def value(spec: InputSpec) -> Tensor | None:
            if spec.fill is None or any(isinstance(dim, str) and dim not in sizes for dim in spec.dims):
                return None
            shape = [sizes[dim] if isinstance(dim, str) else dim for dim in spec.dims]
            return torch.full(shape, spec.fill, dtype=spec.dtype, device=device)

        return [value(spec) if x is None else x for spec, x in zip(self.inputs, tensors, strict=True)]

    def _check_constants(self, given: Mapping[str, Any]) -> None:
        for key, value in given.items():
            if value is None and key not in self.constants:
                continue
            expected = self.constants.get(key, self._default(key))
            if isinstance(value, Tensor) or type(value) is not type(expected) or value != expected:
                what = f"{key}={value!r}" if not isinstance(value, Tensor) else f"the tensor {key}"
                was = f"it was traced with {key}={expected!r}" if key in self.constants else "it was traced without it"
                raise CallError(
                    f"This program cannot take {what}: {was}. Trace the model again with {key} in the example."
                )
        for key, value in self.constants.items():
            default = self._default(key)
            left_out = key not in given and key not in self.assumed and default is not None
            if left_out and value is not None and value != default:
                was = "" if default is inspect.Parameter.empty else f", and the model's default is {default!r}"
                raise CallError(f"This program was traced with {key}={value!r}{was}. Pass {key}={value!r}.")

    def _default(self, key: str) -> Any:
        parameter = self.forward.parameters.get(key)
        return None if parameter is None else parameter.default

    def _check_tensors(self, tensors: list[Tensor | None]) -> None:
        sizes: dict[str, tuple[int, str]] = {}
        for spec, value in zip(self.inputs, tensors, strict=True):
            if value is None:
                if not spec.optional:
                    raise CallError(f"Missing input {spec.key!r}: this program takes {self.describe()}.")
                continue
            if not isinstance(value, Tensor):
                raise CallError(f"{spec.key} must be a tensor, got {type(value).__name__}.")
            if dtype_kind(value.dtype) != dtype_kind(spec.dtype):
                raise CallError(
                    f"{spec.key} has dtype {value.dtype}; this program was traced with {spec.dtype}. "
                    f"Pass {spec.key}.to({spec.dtype})."
                )
            if value.dim() != len(spec.dims):
                raise CallError(
                    f"{spec.key} has {value.dim()} dimensions {tuple(value.shape)}; "
                    f"this program takes {_shape_text(spec)}."
                )
            for axis, (size, dim) in enumerate(zip(value.shape, spec.dims, strict=True)):
                self._check_size(spec, axis, size, dim, sizes)
        known = {name: size for name, (size, _) in sizes.items()}
        for one in self.conditions:
            if not one.holds(known):
                given = ", ".join(f"{name} = {known[name]}" for name in one.sizes)
                raise CallError(
                    f"The model's code takes another branch at {given} than the one that was traced, where {one.code}"
                    f"{_at(one.location)}. Trace the model again with inputs of these sizes."
                )

    def _check_size(
        self, spec: InputSpec, axis: int, size: int, dim: int | str, sizes: dict[str, tuple[int, str]]
    ) -> None:
        if isinstance(dim, int):
            if size != dim:
                place = spec.fixed.get(axis, "")
                by = f"the model's own code fixes it to {dim}{_at(place)}"
                if place == FIXED_BY_CALLER:
                    by = f"it was traced with fixed={{{spec.key!r}: ...}}, which keeps it at {dim}"
                raise CallError(f"{spec.key} has size {size} in dimension {axis}; {by}.")
            return
        seen, where = sizes.setdefault(dim, (size, spec.key))
        if size != seen:
            raise CallError(f"{spec.key} has size {size} in dimension {axis}, {where} has {seen}; they must be equal.")
        low, high = self.ranges.get(dim, (0, None))
        if size < low or (high is not None and size > high):
            limit = f"at most {high}" if high is not None and size > high else f"at least {low}"
            raise CallError(f"{spec.key} has size {size} in dimension {axis}; the model takes {limit}.")

    def describe(self) -> str:
        """Format the inputs: `input_ids: i64[B, S], attention_mask?: i64[B, S]`."""
        return ", ".join(one.describe() for one in self.inputs)


def _at(location: str) -> str:
    return f", at {location}" if location else ""


def _shape_text(spec: InputSpec) -> str:
    return f"{short_dtype(spec.dtype)}[{', '.join(str(dim) for dim in spec.dims)}]"
