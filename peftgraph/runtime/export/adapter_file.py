"""Writes an adapter's tensors as the inputs of an exported file."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from peftgraph.errors import ExportError
from peftgraph.utils.atomic_files import atomic_file

ONNX_BFLOAT16 = 16  # of onnx.TensorProto.DataType


def write_adapter_file(values: Mapping[str, Tensor], path: Path) -> Path:
    """Write tensors by name, in the format of the path's suffix: `.safetensors`, or ONNX Runtime's `.onnx_adapter`.

    Raises:
        ExportError: the suffix is another, or onnxruntime is not installed.
        PeftGraphError: the file cannot be written; an existing one stays unchanged.
    """
    if path.suffix not in (".safetensors", ".onnx_adapter"):
        raise ExportError(f"{path}: an adapter is written as .onnx_adapter or .safetensors.")
    own = {name: value.detach().cpu().clone().contiguous() for name, value in values.items()}
    with atomic_file(path) as temporary:
        if path.suffix == ".safetensors":
            save_file(own, temporary)
        else:
            _write_onnx_adapter(own, temporary)
    return path


def _write_onnx_adapter(values: Mapping[str, Tensor], path: Path) -> None:
    if importlib.util.find_spec("onnxruntime") is None:
        raise ExportError(".onnx_adapter files are written by onnxruntime: pip install onnxruntime.")
    import onnxruntime

    def value_of(tensor: Tensor) -> onnxruntime.OrtValue:
        if tensor.dtype == torch.bfloat16:  # unknown to numpy: its bits
            bits = tensor.view(torch.uint16).numpy()
            return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, ONNX_BFLOAT16)
        return onnxruntime.OrtValue.ortvalue_from_numpy(tensor.numpy())

    written = onnxruntime.AdapterFormat()
    written.set_adapter_version(1)
    written.set_model_version(1)
    written.set_parameters({name: value_of(tensor) for name, tensor in values.items()})
    written.export_adapter(str(path))  # pyright: ignore[reportArgumentType]  # takes a str alone
