"""Codes of weights, made by bitsandbytes: NF4 and FP4 in blocks, int8 in rows.

Shapes: O out, I in, N = O I values, B = N / block blocks; E experts, an axis before O where a weight is a stack.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftgraph.errors import PeftGraphError
from peftgraph.ir.quantised import DEQUANTISE_4BIT, DEQUANTISE_INT8, NESTED_BLOCK, QuantisedWeight

FORMATS = ("nf4", "fp4", "int8")
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # those of bitsandbytes
CODES = "codes"
PLAIN_ARGUMENTS = 6  # of the dequantiser of 4-bit codes, where constants are not quantised


@dataclass(frozen=True)
class Codes:
    """A quantised matrix, or a stack of them.

    Attributes:
        dequantise: the operator that computes the matrix.
        order: the arguments of that operator; a string names a tensor.
        own: the codes and constants of this matrix, by short name.
        shared: tables that all matrices of the format share, by short name.
    """

    dequantise: Callable[..., Tensor]
    order: tuple[Any, ...]
    own: Mapping[str, Tensor]
    shared: Mapping[str, Tensor]

    def value(self) -> Tensor:
        """Compute the matrix."""
        tensors = {**self.own, **self.shared}
        return self.dequantise(*(tensors[one] if isinstance(one, str) else one for one in self.order))


@dataclass(frozen=True)
class Quantiser:
    """How matrices are quantised.

    Attributes:
        format: one of `FORMATS`.
        block: values that share a constant, one of `BLOCKS`; not used by int8, whose rows have a constant each.
        double: whether these constants are quantised too, to 8 bits; not used by int8.
    """

    format: str = "nf4"
    block: int = 64
    double: bool = True

    def quantise(self, matrix: Tensor, dtype: torch.dtype, name: str = "a weight") -> Codes:
        """Quantise a matrix (O, I), or a stack (E, O, I); on the meta device, its shapes alone.

        Args:
            matrix: float64 is rounded to float32 first, and int8 is made from float16, as by bitsandbytes' modules.
            dtype: of what the codes stand for.
            name: of the matrix, for messages.

        Raises:
            PeftGraphError: bitsandbytes is not installed, or a value is not finite or too large.
        """
        matrix = matrix.detach()
        if matrix.device.type != "meta":
            _check_finite(matrix, name)
        make = self._int8 if self.format == "int8" else self._four_bits
        return make(matrix.float() if matrix.dtype == torch.float64 else matrix, dtype, name)

    def _four_bits(self, matrix: Tensor, dtype: torch.dtype, name: str) -> Codes:
        shape = [int(size) for size in matrix.shape]
        if matrix.device.type == "meta":
            own, shared = self._four_bit_shapes(matrix)
        else:
            functional = bitsandbytes()
            codes, state = functional.quantize_4bit(
                matrix.contiguous(), blocksize=self.block, compress_statistics=self.double, quant_type=self.format
            )
            own = {CODES: codes, "absmax": state.absmax}
            shared = {"table": state.code}
            if self.double:
                own |= {"nested_absmax": state.state2.absmax, "offset": state.offset}
                shared |= {"nested_table": state.state2.code}
        nested = ("nested_table", "nested_absmax", "offset") if self.double else ()
        order = (CODES, "table", "absmax", self.block, tuple(shape), dtype, *nested)
        return Codes(DEQUANTISE_4BIT, order, own, shared)

    def _four_bit_shapes(self, matrix: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        blocks = -(-matrix.numel() // self.block)
        constants = torch.uint8 if self.double else torch.float32
        own = {CODES: _empty((matrix.numel() + 1) // 2, 1), "absmax": _empty(blocks, dtype=constants)}
        shared = {"table": _empty(16, dtype=torch.float32)}
        if self.double:
            own |= {"nested_absmax": _empty(-(-blocks // NESTED_BLOCK), dtype=torch.float32)}
            own |= {"offset": _empty(dtype=torch.float32)}
            shared |= {"nested_table": _empty(256, dtype=torch.float32)}
        return own, shared

    def _int8(self, matrix: Tensor, dtype: torch.dtype, name: str) -> Codes:
        if matrix.device.type == "meta":
            own = {CODES: _empty(*matrix.shape, dtype=torch.int8)}
            own |= {"absmax": _empty(*matrix.shape[:-1], dtype=torch.float32)}
        else:
            half = matrix.reshape(-1, matrix.shape[-1]).to(torch.float16)
            if not bool(torch.isfinite(half).all()):
                raise PeftGraphError(
                    f"{name} has values beyond float16, from which int8 codes are made. Use nf4 there."
                )
            codes, absmax, _ = bitsandbytes().int8_vectorwise_quant(half.contiguous())
            own = {CODES: codes.reshape(matrix.shape), "absmax": absmax.reshape(matrix.shape[:-1])}
        return Codes(DEQUANTISE_INT8, (CODES, "absmax", dtype), own, {})


def describe_codes(how: Quantiser | QuantisedWeight) -> str:
    """Return in words how codes stand for values: equal words for codes of one format."""
    if isinstance(how, Quantiser):
        if how.format == "int8":
            return "int8 codes by row"
        return _four_bits_in_words(how.format, how.block, how.double)
    if how.dequantise is DEQUANTISE_INT8:
        return "int8 codes by row"
    table, block = str(how.arguments[1]), how.arguments[3]
    known = (one for one in FORMATS if table == f"quantise.{one}_table")
    return _four_bits_in_words(next(known, f"a table of its own, {table}"), block, len(how.arguments) > PLAIN_ARGUMENTS)


def _four_bits_in_words(format: str, block: int, double: bool) -> str:
    return f"4-bit codes ({format}) in blocks of {block}, with constants of {'8 bits' if double else 'float32'}"


def _empty(*shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _check_finite(matrix: Tensor, name: str) -> None:
    wrong = int((~torch.isfinite(matrix)).sum())
    if wrong:
        raise PeftGraphError(
            f"{name} holds {wrong} values that are infinite or no numbers, which no code stands for. Leave it out."
        )


def bitsandbytes() -> Any:
    """Return bitsandbytes' functions.

    Raises:
        PeftGraphError: it is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise PeftGraphError('Quantising weights needs bitsandbytes: pip install "peftgraph[quantise]".')
    import bitsandbytes.functional

    return bitsandbytes.functional
