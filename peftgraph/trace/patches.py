"""Pieces of transformers that a graph cannot hold, and their forms that it can.

Some of its models loop over the values of a tensor (packed images of several sizes); the library has forms of these
pieces that can be exported, for a second try. Some masks are made by `torch.vmap`; they are made by broadcasting. A
model that is exported as it stands is never patched, and one that is not is compared with its own code.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._dynamo import _trace_wrapped_higher_order_op as indexing
from torch.nn import functional
from torch.utils import _pytree as pytree

from peftgraph.trace.example import Example
from peftgraph.trace.surrounding import frozen_copy

PACKED = "_reshaped_vision_attention_forward"  # the library's exportable attention within packed pictures
Patches = Callable[[], AbstractContextManager[None]]


def library_patches(model: nn.Module) -> Patches | None:
    """The patches, where parts of the model are transformers' and its version has exporters."""
    if not any(type(module).__module__.startswith("transformers.") for module in model.modules()):
        return None
    try:
        # Importing it registers what is applied.
        forms = importlib.import_module("transformers.exporters.exporter_dynamo")
        exporters = importlib.import_module("transformers.exporters.utils")
    except ImportError:
        return None
    return partial(_patched, forms, exporters) if hasattr(forms, PACKED) else None


@contextmanager
def _patched(forms: Any, exporters: Any) -> Iterator[None]:
    """The library's patches, with packed pictures of any lengths: its own form takes lengths that are all equal."""
    packed = partial(_attend_within, getattr(forms, PACKED))
    with exporters.apply_patches("dynamo"), patch.object(forms, PACKED, packed):
        yield


def _attend_within(
    packed: Callable[..., Any], module: nn.Module, hidden_states: Tensor, cu_seqlens: Tensor, **options: Any
) -> Any:
    """Attention of rows (N, D) or (1, N, D) to those of the same picture: that of one picture, under a mask.

    Args:
        packed: the library's form, for pictures of equal length.
        module: the attention.
        hidden_states: the rows of all pictures.
        cu_seqlens: where pictures start and end, from 0 to N.
        options: of `packed`.
    """
    rows = torch.arange(hidden_states.shape[-2], device=hidden_states.device)
    number = (rows[:, None] >= cu_seqlens[None, 1:]).sum(-1)
    masked = partial(functional.scaled_dot_product_attention, attn_mask=number[:, None] == number[None, :])
    with patch.object(functional, "scaled_dot_product_attention", masked):
        return packed(module, hidden_states, torch.cat([cu_seqlens[:1], cu_seqlens[-1:]]), **options)


@contextmanager
def masks_broadcast() -> Iterator[Callable[[], bool]]:
    """Has the masks of custom functions made by broadcasting their indices, instead of under vmap, whose levels an
    exported graph loses. Gives a function that tells whether a mask was."""
    masking: Any = sys.modules.get("transformers.masking_utils")
    made: list[Callable[..., Tensor]] = []

    def expansion(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def mask(*indices: Tensor) -> Tensor:
            made.append(function)
            grid = torch.meshgrid(*indices, indexing="ij")
            return function(*grid).expand(grid[0].shape)

        return mask

    if not hasattr(masking, "_vmap_expansion_sdpa"):
        yield lambda: False
        return
    # Inside a mask's function, x[i] is a call that keeps itself out of graphs; it is the plain operator.
    plain = patch.object(indexing, "mod_index", torch.ops.aten.index)
    with plain, patch.object(masking, "_vmap_expansion_sdpa", expansion):
        yield lambda: bool(made)


def difference(model: nn.Module, example: Example, outputs: Sequence[Tensor]) -> str | None:
    """How `outputs` differ from what the unpatched model gives in evaluation; None: by rounding at most."""
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        return "its weights are on the meta device, so its patched form cannot be compared with it"
    args, kwargs = example.call(example.arguments)
    with torch.no_grad():
        output = example.result(frozen_copy(model)(*args, **kwargs))
    expected = [one for one in pytree.tree_leaves(output) if _is_tensor(one)]
    if len(expected) != len(outputs):
        return f"its patched form gives {len(outputs)} tensors instead of {len(expected)}"
    for ours, theirs in zip(outputs, expected, strict=True):
        try:
            torch.testing.assert_close(ours, theirs)
        except AssertionError as error:
            return f"its patched form gives other values: {str(error).splitlines()[0]}"
    return None


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)
