"""Weights that are stored as codes of 4 or 8 bits: how codes become values, and products that do so anew for their
gradients.

The values are those of bitsandbytes, to the bit, computed by torch alone: two codes a byte, the first in the high half;
a code is looked up in a table and multiplied by the constant of its block, in float32, and rounded once to the dtype in
which the weight was stored. The constants of blocks may be codes themselves ("double quantisation").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.autograd.function import once_differentiable

NESTED_BLOCK = 256  # constants that share one constant of their own
INT8_STEP = 7.874015718698502e-3  # 1 / 127 as bitsandbytes writes it
COMPUTES_IN = "computes_in"  # in a node's metadata: the dtype in which it multiplies by a dequantised weight
ROUNDS = "rounds"  # in a node's metadata: its dtype is a rounding of what is stored, also where all else is widened


@torch.library.custom_op("peftgraph::dequantise_4bit", mutates_args=())
def dequantise_4bit(
    codes: Tensor,
    table: Tensor,
    absmax: Tensor,
    block: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    nested_table: Tensor | None = None,
    nested_absmax: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    """Compute a weight of some shape from its codes.

    Args:
        codes: uint8, two values a byte; of any shape.
        table: the 16 values of the codes.
        absmax: the constants of the blocks: float32, or uint8 codes of them.
        block: values that share a constant.
        shape: of the weight.
        dtype: of the weight.
        nested_table: the 256 values of the constants' codes.
        nested_absmax: the constants of the constants' blocks.
        offset: what is added to the constants; a number.
    """
    if nested_table is not None:
        assert nested_absmax is not None
        assert offset is not None
        scaled = _scaled(nested_table.float()[absmax.int()], nested_absmax.float(), NESTED_BLOCK)
        absmax = scaled + offset.float()
    pairs = _pairs(table.float()).view(torch.float64).reshape(-1)  # both values of a byte, moved as one number
    values = pairs.index_select(0, codes.reshape(-1).int()).view(torch.float32)
    return _scaled(values[: math.prod(shape)], absmax.float(), block).reshape(shape).to(dtype)


@dequantise_4bit.register_fake
def _(codes: Tensor, table: Tensor, absmax: Tensor, block: int, shape: Sequence[int], dtype: torch.dtype,
      nested_table: Tensor | None = None, nested_absmax: Tensor | None = None,
      offset: Tensor | None = None) -> Tensor:  # fmt: skip
    return torch.empty(tuple(shape), dtype=dtype, device=codes.device)


@torch.library.custom_op("peftgraph::dequantise_int8", mutates_args=())
def dequantise_int8(codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute a weight (..., O, I) from int8 codes and the largest magnitude of each row, (..., O)."""
    return (codes * absmax.float().unsqueeze(-1) * INT8_STEP).to(dtype)


@dequantise_int8.register_fake
def _(codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(codes.shape, dtype=dtype, device=codes.device)


DEQUANTISE_4BIT = torch.ops.peftgraph.dequantise_4bit.default
DEQUANTISE_INT8 = torch.ops.peftgraph.dequantise_int8.default
DEQUANTISERS = (DEQUANTISE_4BIT, DEQUANTISE_INT8)


def _pairs(table: Tensor) -> Tensor:
    """Return the two values that each byte stands for, (256, 2)."""
    return torch.stack([table.repeat_interleave(16), table.repeat(16)], 1)


def _scaled(values: Tensor, constants: Tensor, block: int) -> Tensor:
    """Values (N,) times the constant of their block; the last block may be shorter."""
    count = values.numel()
    whole = count // block * block
    scaled = values[:whole].view(-1, block) * constants[: whole // block].unsqueeze(-1)
    if whole == count:
        return scaled.reshape(-1)
    return torch.cat([scaled.reshape(-1), values[whole:] * constants[-1]])


@dataclass(frozen=True)
class QuantisedWeight:
    """Describe how a stored tensor is computed from codes, which are stored in its place.

    Attributes:
        dequantise: the operator that computes the matrix (..., O, I).
        arguments: of that operator; a string names a stored tensor.
        transposed: whether the tensor itself is (..., I, O).
        made_by: the spec of the pass that made the codes.
        remake: makes other codes and constants, by name, for another matrix; None where it is not known how.
    """

    dequantise: Callable[..., Tensor]
    arguments: tuple[Any, ...]
    transposed: bool
    made_by: str
    remake: Callable[[Tensor], dict[str, Tensor]] | None = None

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of the stored tensors that it is computed from."""
        return tuple(one for one in self.arguments if isinstance(one, str))

    def value(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Compute the tensor in its stored layout."""
        given = [tensors[one] if isinstance(one, str) else one for one in self.arguments]
        matrix = self.dequantise(*given)
        return matrix.transpose(-2, -1) if self.transposed else matrix


# Products that keep a weight for their gradients, and what may stand between them and the weight.
PRODUCTS = {
    "linear", "addmm", "mm", "matmul", "bmm", "baddbmm", "conv1d", "conv2d", "_grouped_mm", "grouped_mm_fallback",
}  # fmt: skip
ROUTES = {"t", "transpose", "permute", "view", "reshape", "contiguous", "alias", "unsqueeze", "squeeze", "to"}


@dataclass(frozen=True)
class DequantisedProduct:
    """The target of a node that multiplies by a weight which is computed from codes, forward and backward anew.

    Attributes:
        dequantise: computes the matrix.
        route: operators between the matrix and the product, each with its literal arguments.
        product: the operator.
        position: of the weight among its arguments.
        keywords: of the product.
        word: the name of the product.
        factor: the place, among the operands without the weight, of what the weight multiplies.
        is_plain: whether it is x M + b for a matrix M, whose gradients need no x.
    """

    dequantise: Callable[..., Tensor]
    route: tuple[tuple[Callable[..., Tensor], tuple[Any, ...]], ...]
    product: Callable[..., Tensor]
    position: int
    keywords: tuple[tuple[str, Any], ...]
    word: str = field(init=False)
    factor: int = field(init=False)
    is_plain: bool = field(init=False)

    def __post_init__(self) -> None:
        word = _word(self.product)
        turned = all(_word(step) in ("t", "transpose") for step, _ in self.route)
        place = {"linear": 1, "mm": 1, "matmul": 1, "addmm": 2}.get(word)
        object.__setattr__(self, "word", word)
        object.__setattr__(self, "factor", 1 if word in ("addmm", "baddbmm") else 0)
        object.__setattr__(self, "is_plain", turned and self.position == place and not self.keywords)

    @property
    def __name__(self) -> str:
        return f"dequantised_{self.word.strip('_')}"

    def __call__(self, codes: tuple[Any, ...], operands: tuple[Any, ...], compute: torch.dtype | None = None) -> Tensor:
        """Compute the product.

        Args:
            codes: the arguments of `dequantise`.
            operands: the arguments of the product without the weight.
            compute: the dtype to multiply in; None for that of what is multiplied.
        """
        tensors = [one for one in (*codes, *operands) if isinstance(one, Tensor)]
        grads = torch.is_grad_enabled() and any(one.requires_grad for one in tensors)
        if not grads:
            return self.compute(codes, operands, compute)
        return cast("Tensor", _Product.apply(self, compute, len(codes), *codes, *operands))

    def weight(self, codes: Sequence[Any], dtype: torch.dtype) -> Tensor:
        """Compute the weight as the product takes it, rounded once."""
        value = self.dequantise(*in_dtype(codes, dtype))
        for step, arguments in self.route:
            value = step(value, *(list(one) if isinstance(one, tuple) else one for one in arguments))
        return value.to(dtype)

    def compute(self, codes: Sequence[Any], operands: Sequence[Any], compute: torch.dtype | None) -> Tensor:
        """Compute the product by torch's own operator."""
        x = operands[self.factor]
        dtype = compute or x.dtype
        given = [_cast(one, dtype) for one in operands]
        given.insert(self.position, self.weight(codes, dtype))
        return self.product(*given, **dict(self.keywords)).to(x.dtype)

    def plain_gradients(self, weight: Tensor, operands: Sequence[Any], grad: Tensor) -> list[Tensor | None]:
        """Return the gradients by the operands of x M + b.

        Args:
            weight: (O, I) of a linear, else (I, O).
            operands: in their order, with no more than their shape, dtype and `requires_grad`.
            grad: by the result.
        """
        found: list[Tensor | None] = []
        for i, one in enumerate(operands):
            if one is None or not one.requires_grad:
                found.append(None)
            elif i == self.factor:
                found.append(grad.matmul(weight if self.word == "linear" else weight.t()))
            else:
                found.append(grad.sum_to_size(one.shape))
        return found


def in_dtype(codes: Sequence[Any], dtype: torch.dtype) -> tuple[Any, ...]:
    """Return the arguments of a dequantiser for another dtype of its result."""
    return tuple(dtype if isinstance(one, torch.dtype) else one for one in codes)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


@dataclass(frozen=True)
class _Shape:
    """What is kept of an operand whose values no gradient needs."""

    shape: torch.Size
    dtype: torch.dtype
    requires_grad: bool


class _Product(torch.autograd.Function):
    """A product that keeps the codes of its weight, and not the weight."""

    @staticmethod
    def forward(ctx: Any, target: DequantisedProduct, compute: torch.dtype | None, split: int, *given: Any) -> Tensor:
        codes, operands = given[:split], given[split:]
        ctx.target, ctx.compute, ctx.split = target, compute, split
        ctx.plain = target.is_plain and len(_shape_of(codes)) == 2
        shapes = [
            _Shape(one.shape, one.dtype, needed) if isinstance(one, Tensor) else one
            for one, needed in zip(operands, ctx.needs_input_grad[3 + split :], strict=True)
        ]
        kept = [*codes, *(shapes if ctx.plain else operands)]
        ctx.places = [i for i, one in enumerate(kept) if isinstance(one, Tensor)]
        ctx.rest = [None if isinstance(one, Tensor) else one for one in kept]
        ctx.dtype = compute or operands[target.factor].dtype
        ctx.save_for_backward(*(kept[i] for i in ctx.places))
        return target.compute(codes, operands, compute)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        kept = list(ctx.rest)
        for i, tensor in zip(ctx.places, ctx.saved_tensors, strict=True):
            kept[i] = tensor
        codes, operands = kept[: ctx.split], kept[ctx.split :]
        if ctx.plain:
            weight = ctx.target.weight(codes, ctx.dtype)
            found = ctx.target.plain_gradients(weight, operands, grads[0].to(ctx.dtype))
            found = [None if g is None else g.to(one.dtype) for g, one in zip(found, operands, strict=True)]
        else:
            found = _replayed(ctx, codes, operands, grads[0])
        return (None, None, None, *([None] * ctx.split), *found)


def _shape_of(codes: Sequence[Any]) -> Sequence[int]:
    """Return the shape of the matrix that codes stand for."""
    shape = next((one for one in codes if isinstance(one, list | tuple)), None)
    return codes[0].shape if shape is None else shape


def _replayed(ctx: Any, codes: Sequence[Any], operands: Sequence[Any], grad: Tensor) -> list[Tensor | None]:
    """Return the gradients of any product, which runs once more."""
    needed = ctx.needs_input_grad[3 + ctx.split :]
    leaves = [
        one.detach().requires_grad_(need) if isinstance(one, Tensor) else one
        for one, need in zip(operands, needed, strict=True)
    ]
    with torch.enable_grad():
        result = ctx.target.compute(codes, leaves, ctx.compute)
    wanted = [one for one, need in zip(leaves, needed, strict=True) if need]
    found = iter(torch.autograd.grad(result, wanted, grad))
    return [next(found) if need else None for need in needed]


def fuse_dequantised_products(graph: fx.Graph) -> None:
    """Replace, in place, products by a dequantised weight by ones that dequantise it themselves."""
    for node in [node for node in graph.nodes if node.target in DEQUANTISERS]:
        for product, operand, route in products_of(node):
            _fuse(graph, node, product, operand, route)


Route = tuple[tuple[Any, tuple[Any, ...]], ...]


def products_of(source: fx.Node, route: Route = ()) -> list[tuple[fx.Node, fx.Node, Route]]:
    """Return the products that read a dequantised weight, each with the operand and how that is made of the weight."""
    found: list[tuple[fx.Node, fx.Node, Route]] = []
    for user in source.users:
        if not isinstance(user.target, torch._ops.OpOverload):
            continue
        word = _word(user.target)
        rest = user.args[1:]
        literal = not _holds_nodes(user.kwargs)
        if word in PRODUCTS and literal and [one is source for one in user.args].count(True) == 1:
            found.append((user, source, route))
        elif word in ROUTES and user.args[0] is source and not user.kwargs and not _holds_nodes(rest):
            step = (user.target, tuple(tuple(one) if isinstance(one, list | tuple) else one for one in rest))
            found += products_of(user, (*route, step))
    return found


def _fuse(graph: fx.Graph, codes: fx.Node, product: fx.Node, operand: fx.Node, route: Any) -> None:
    position = list(product.args).index(operand)
    operands = tuple(one for i, one in enumerate(product.args) if i != position)
    assert isinstance(codes.target, torch._ops.OpOverload)
    target = _target(codes.target, route, product.target, position, tuple(product.kwargs.items()))
    with graph.inserting_before(product):
        fused = graph.call_function(target, (codes.args, operands), {"compute": product.meta.get(COMPUTES_IN)})
    fused.meta = dict(product.meta)
    product.replace_all_uses_with(fused)
    graph.erase_node(product)


@cache
def _target(*parts: Any) -> DequantisedProduct:
    """One target for equal products, so that blocks that read alike share their code."""
    return DequantisedProduct(*parts)


def _holds_nodes(value: Any) -> bool:
    found: list[fx.Node] = []
    fx.map_arg(value, found.append)
    return bool(found)


def _word(target: Any) -> str:
    return target._schema.name.split("::")[-1]
