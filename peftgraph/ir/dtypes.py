"""Kinds and short names of dtypes."""

from __future__ import annotations

import torch

SHORT = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.bool: "bool",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.complex64: "c64",
    torch.complex128: "c128",
}


def dtype_kind(dtype: torch.dtype) -> str:
    """Return the kind of a dtype: "bool", "integer", "floating" or "complex"."""
    if dtype == torch.bool:
        return "bool"
    if dtype.is_complex:
        return "complex"
    return "floating" if dtype.is_floating_point else "integer"


def short_dtype(dtype: torch.dtype) -> str:
    """Return the printed name of a dtype: f32, bf16, i64, bool."""
    return SHORT.get(dtype, str(dtype).removeprefix("torch."))
