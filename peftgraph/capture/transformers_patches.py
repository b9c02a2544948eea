"""Pieces of transformers that a graph cannot hold, and their forms that it can.

Some of its models loop over the values of a tensor (packed images of several sizes); the library has forms of these
pieces that can be exported, for a second try. Some masks are made by `torch.vmap`; they are made by broadcasting. A
model that is exported as it stands is never patched, and one that is not is compared with its own code.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._dynamo import _trace_wrapped_higher_order_op as indexing
from torch.utils import _pytree as pytree

from peftgraph.capture.example_inputs import Example
from peftgraph.capture.submodule import frozen_copy

# What the library's attention over packed pictures calls, and is given here, in a graph.
BRANCH, INTERFACES, LONGEST = "is_flash_attention_requested", "ALL_ATTENTION_FUNCTIONS", "get_max_seqlen"
Patches = Callable[[], AbstractContextManager[None]]


def library_patches(model: nn.Module) -> Patches | None:
    """Return the patches if parts of the model are transformers' and its version has exporters; otherwise None."""
    if not any(type(module).__module__.startswith("transformers.") for module in model.modules()):
        return None
    try:
        importlib.import_module("transformers.exporters.exporter_dynamo")  # registers what is applied
        exporters = importlib.import_module("transformers.exporters.utils")
    except ImportError:
        return None
    return partial(_patched, model, exporters)


@contextmanager
def _patched(model: nn.Module, exporters: Any) -> Iterator[None]:
    """Apply the library's patches, except the one for attention over packed images, which supports only images of one
    size."""
    forwards = {kind: kind.forward for kind in {type(module) for module in model.modules()} if _is_packed(kind)}
    with ExitStack() as stack:
        stack.enter_context(exporters.apply_patches("dynamo"))
        for kind, forward in forwards.items():
            stack.enter_context(patch.object(kind, "forward", _whole(forward)))
        yield


def _is_packed(kind: type[nn.Module]) -> bool:
    """Tell whether this is attention over packed images, which it splits for all kernels but those that take
    lengths."""
    names = getattr(kind.forward, "__globals__", {})
    takes = "cu_seqlens" in inspect.signature(kind.forward).parameters
    return takes and BRANCH in names and INTERFACES in names


def _whole(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return `forward` on its branch for kernels that take lengths, with masked attention as the kernel."""
    names = forward.__globals__
    kernel = SimpleNamespace(get_interface=lambda *_: _attend_within)
    given = {BRANCH: lambda *_: True, INTERFACES: kernel, LONGEST: lambda *_, **__: None}

    @functools.wraps(forward)
    def whole(*args: Any, **kwargs: Any) -> Any:
        with patch.dict(names, {name: value for name, value in given.items() if name in names}):
            return forward(*args, **kwargs)

    return whole


def _attend_within(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, cu_seq_lens_q: Tensor, **options: Any
) -> tuple[Tensor, None]:
    """Attention of rows to those of the same picture, in the library's interface.

    Args:
        module: the attention.
        query: (1, heads, N, E), the rows of all pictures one after another.
        key: as `query`.
        value: as `query`.
        cu_seq_lens_q: where pictures start and end, from 0 to N.
        options: scale and dropout among them.

    Returns:
        (1, N, heads, E), and no weights.
    """
    attend = importlib.import_module("transformers.integrations.sdpa_attention").sdpa_attention_forward
    rows = torch.arange(query.shape[-2], device=query.device)
    number = (rows[:, None] >= cu_seq_lens_q[None, 1:]).sum(-1)
    kept = {name: options[name] for name in ("scaling", "dropout") if name in options}
    mask = (number[:, None] == number[None, :])[None, None]
    return attend(module, query, key, value, attention_mask=mask, is_causal=False, **kept)


@contextmanager
def broadcast_masks() -> Iterator[Callable[[], bool]]:
    """Build the masks of custom functions by broadcasting their indices instead of by vmap, whose levels an exported
    graph loses. Yield a function that tells whether one was built."""
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


def patch_difference(model: nn.Module, example: Example, outputs: Sequence[Tensor]) -> str | None:
    """Return how `outputs` differ from the unpatched model's in evaluation; None if by rounding at most."""
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
