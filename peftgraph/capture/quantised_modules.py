"""Models that hold projections of bitsandbytes, as transformers loads them in 4 or 8 bits.

What is traced is a copy in which plain projections stand in their places; the graph then reads their codes. Products
are computed as `Linear4bit` computes them, to the bit. `Linear8bitLt` quantises its inputs too, except while it trains
on a CPU; here the weight alone is quantised, in both modes.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftgraph.errors import TraceError
from peftgraph.ir.quantised import DEQUANTISE_4BIT, DEQUANTISE_INT8, NESTED_BLOCK, DequantisedProduct, QuantisedWeight
from peftgraph.ir.quantised_base import StoredCodes

LINEAR = torch.ops.aten.linear.default


def quantised_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the projections of bitsandbytes, by path."""
    library: Any = sys.modules.get("bitsandbytes.nn")  # imported, if the model holds one of its modules
    if library is None:
        return {}
    kinds = (library.Linear4bit, library.Linear8bitLt)
    return {path: one for path, one in model.named_modules(remove_duplicate=False) if isinstance(one, kinds)}


def codes_of_model(model: nn.Module) -> dict[str, StoredCodes]:
    """Return the codes of the weights of a model's quantised projections, by the name of the weight.

    Raises:
        TraceError: a projection is not quantised yet, or in a way that is not known.
    """
    found = quantised_modules(model)
    own = {id(parameter) for module in found.values() for parameter in module.parameters()}
    sizes: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        if id(parameter) not in own and parameter.is_floating_point():
            sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
    dtype = max(sizes, key=lambda one: sizes[one], default=None)
    tables: dict[str, Tensor] = {}
    codes: dict[str, StoredCodes] = {}
    for path, module in found.items():
        name = f"{path}.weight"
        four = hasattr(module, "quant_state")
        codes[name] = _four_bits(name, module, dtype, tables) if four else _eight_bits(name, module, dtype)
    return codes


def _four_bits(name: str, module: Any, dtype: torch.dtype | None, tables: dict[str, Tensor]) -> StoredCodes:
    state = module.weight.quant_state or module.quant_state
    if state is None:
        raise _not_quantised(name)
    codes = module.weight.detach().as_subclass(Tensor)
    if getattr(state, "packing_format_for_cpu", False):
        functional: Any = sys.modules["bitsandbytes.functional"]
        codes, state = functional._convert_weight_packed_for_cpu_inverse(codes.clone(), copy.deepcopy(state))
    if codes.dtype != torch.uint8:
        codes = codes.view(torch.uint8)
    tensors = {f"{name}_codes": codes.reshape(-1, 1), f"{name}_absmax": state.absmax.detach()}
    table = _shared(f"quantise.{state.quant_type}_table", f"{name}_table", state.code, tables)
    nested: dict[str, Tensor] = {}
    if state.nested:
        if state.state2.blocksize != NESTED_BLOCK:
            raise TraceError(f"{name}: its constants are quantised in blocks of {state.state2.blocksize}, not 256.")
        nested = _shared(f"quantise.{state.quant_type}_nested_table", f"{name}_nested_table", state.state2.code, tables)
        nested |= {f"{name}_nested_absmax": state.state2.absmax.detach(), f"{name}_offset": state.offset.detach()}
    first, absmax = tensors
    shape = tuple(int(size) for size in state.shape)
    kind = dtype or state.dtype  # products read it unrounded, whatever dtype it was quantised from
    arguments = (first, *table, absmax, state.blocksize, shape, kind, *nested)
    how = QuantisedWeight(DEQUANTISE_4BIT, arguments, False, f"the model's own {type(module).__name__}")
    return StoredCodes(how, tensors | table | nested, kind, module.compute_dtype)


def _shared(name: str, own: str, table: Tensor, known: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a table of codes under the name that all weights share, or under its own where it is another one."""
    first = known.setdefault(name, table.detach())
    return {name: first} if torch.equal(first, table) else {own: table.detach()}


def _eight_bits(name: str, module: Any, dtype: torch.dtype | None) -> StoredCodes:
    codes = module.weight.CB if module.state.CB is None else module.state.CB
    absmax = module.weight.SCB if module.state.SCB is None else module.state.SCB
    if codes is None or absmax is None or module.state.has_fp16_weights:
        raise _not_quantised(name)
    tensors = {f"{name}_codes": codes.detach().as_subclass(Tensor), f"{name}_absmax": absmax.detach()}
    kind = dtype or torch.float32
    how = QuantisedWeight(DEQUANTISE_INT8, (*tensors, kind), False, f"the model's own {type(module).__name__}")
    return StoredCodes(how, tensors, kind, None)


def _not_quantised(name: str) -> TraceError:
    return TraceError(
        f"{name} belongs to a projection of bitsandbytes that is not quantised yet. Move the model to its device, "
        'which quantises it (model.to("cpu"), with has_fp16_weights=False), before it is traced.'
    )


def with_plain_projections(model: nn.Module, coded: Mapping[str, StoredCodes]) -> nn.Module:
    """Return a copy of a model, sharing its tensors, in which plain projections without values stand for quantised
    ones."""
    return _replaced(model, {name: _plain(model.get_submodule(_path(name)), one) for name, one in coded.items()})


def with_dequantised_projections(model: nn.Module, coded: Mapping[str, StoredCodes]) -> nn.Module:
    """Return a copy of a model, sharing its tensors, in which projections by dequantised weights stand for quantised
    ones: what a program of it is compared with."""
    own = {name: model.get_submodule(_path(name)) for name in coded}
    return _replaced(
        model, {name: DequantisedLinear(coded[name], getattr(one, "bias", None)) for name, one in own.items()}
    )


def _path(name: str) -> str:
    return name.rpartition(".")[0]


def _replaced(model: nn.Module, modules: Mapping[str, nn.Module]) -> nn.Module:
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    for module in model.modules():
        memo |= {id(value): value for value in vars(module).values() if isinstance(value, Tensor)}
    memo |= {id(model.get_submodule(_path(name))): module for name, module in modules.items()}
    return copy.deepcopy(model, memo)


def _plain(module: Any, one: StoredCodes) -> nn.Module:
    made = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
    codes = next(iter(one.tensors.values()))
    value = torch.empty(1, 1, dtype=one.dtype, device=codes.device).expand(module.out_features, module.in_features)
    made.weight = nn.Parameter(value, requires_grad=False)
    made.register_parameter("bias", _bias(module.bias, one))
    return made.train(module.training)


def _bias(bias: nn.Parameter | None, one: StoredCodes) -> nn.Parameter | None:
    """Return the bias in the dtype of the model: a run of the model may have cast it to that of its products."""
    if bias is None or bias.dtype == one.dtype:
        return bias
    return nn.Parameter(bias.detach().to(one.dtype), requires_grad=bias.requires_grad)


class DequantisedLinear(nn.Module):
    """A projection by a weight that is computed from codes."""

    def __init__(self, one: StoredCodes, bias: nn.Parameter | None) -> None:
        super().__init__()
        self._product = DequantisedProduct(one.how.dequantise, (), LINEAR, 1, ())
        self._compute, self._order = one.compute, one.how.arguments
        for name, tensor in one.tensors.items():
            self.register_buffer(name.rpartition(".")[2], tensor)
        self.bias = _bias(bias, one)

    def forward(self, x: Tensor) -> Tensor:
        """x W^T + b."""
        codes = tuple(self.get_buffer(one.rpartition(".")[2]) if isinstance(one, str) else one for one in self._order)
        return self._product(codes, (x, self.bias), self._compute)
