"""Examples that ask for a cache: the keys and values of an earlier call stand among the inputs that are traced.

The graph of such a call serves every call; `without_cached_inputs` derives the graph of a first call from it.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import chain, count
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from peftgraph.capture.diagnosis import explain, exporter_silenced
from peftgraph.capture.example_inputs import PRIMES, Example
from peftgraph.capture.export_run import marker_dtypes
from peftgraph.capture.fake_model import compiling_flag_set, fake_arguments, fake_copy_of
from peftgraph.capture.submodule import frozen_copy
from peftgraph.errors import TraceError
from peftgraph.ir.kv_cache import KVCacheSpec, default_input

NAMES = ("cache", "past_key_values")  # what versions of transformers call it


def with_cached_tokens(model: nn.Module, example: Example, own: torch.dtype) -> Example:
    """Turn an example that asks for a cache into a later call, with random keys and values of earlier tokens.

    The mask is extended over them. A mask and positions that the model takes and the example omits are added, since
    generation passes them.

    Args:
        model: the model; it is run, where it has weights, to find which positions it uses when none are given.
        example: the call to trace.
        own: the dtype of the model's weights.

    Raises:
        TraceError: the model caches something other than keys and values along the sequence.
    """
    argument = next((name for name in NAMES if name in example.forward.parameters), None)
    if example.arguments.get("use_cache") is not True or argument is None or argument in example.arguments:
        return example
    paired = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    tokens = example.arguments.get(KVCacheSpec(argument, (), paired).tokens)
    if not isinstance(tokens, Tensor) or tokens.dim() != 2:
        raise TraceError("An example that asks for a cache needs input_ids (decoder_input_ids): batch x length.")
    marker = marker_dtypes(model, own)[0] or own
    layers = _layers(model, example, argument, paired, (own, marker))
    past, shapes = KVCacheSpec(argument, tuple(layers), paired), list(layers.values())
    length = tokens.shape[1]
    if any(len(one) != 4 or one[-2] != length for pair in shapes for one, _ in pair):
        raise TraceError(
            f"{type(model).__name__} caches more than keys and values of every token: "
            f"{', '.join(str(tuple(keys[0])) for keys, _ in shapes)}. Trace it without use_cache."
        )
    before = _free_size(example, shapes, length)
    generator = torch.Generator().manual_seed(0)
    tensors = [_random((*one[:-2], before, one[-1]), own, device, generator) for pair in shapes for one, device in pair]
    defaults = {} if paired else {"attention_mask": "ones", "position_ids": _positions(model, example, argument)}
    arguments = {**_prefixed(example, tokens, before, paired), argument: tuple(tensors)}
    return replace(example, kv_cache=past, defaults=defaults).with_arguments(arguments)


def _layers(
    model: nn.Module, example: Example, argument: str, paired: bool, dtypes: tuple[torch.dtype, torch.dtype]
) -> dict[int, list[tuple[torch.Size, torch.device]]]:
    """Return the shape and device of the keys and values that a first call caches, by layer."""
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    fake_model = fake_copy_of(model, mode, *dtypes).eval()
    arguments = fake_arguments(dict(example.arguments), mode, *dtypes)
    cache = KVCacheSpec(argument, (), paired).cache()
    args, kwargs = example.call({**arguments, argument: cache})
    try:
        with torch.no_grad(), mode, exporter_silenced(), compiling_flag_set():
            fake_model(*args, **kwargs)
    except Exception as error:  # whatever a model's code raises is explained to the user
        raise explain(model, error) from error
    own = cache.self_attention_cache if paired else cache
    kept = {i: (layer.keys, layer.values) for i, layer in enumerate(own.layers) if layer.is_initialized}
    return {i: [(one.shape, one.device) for one in pair] for i, pair in kept.items()}


def _positions(model: nn.Module, example: Example, argument: str) -> str | None:
    """Find which positions the model uses when none are given, by running it; return the name of a fill."""
    tokens = example.arguments["input_ids"]
    if "position_ids" not in example.forward.parameters or any(p.is_meta for p in model.parameters()):
        return None
    mask = torch.ones_like(tokens)
    mask[0, : tokens.shape[1] // 2] = 0
    net = frozen_copy(model)
    given = {**example.arguments, "use_cache": False, "attention_mask": mask}
    given.pop("position_ids", None)

    def answer(**more: Tensor) -> list[Tensor]:
        args, kwargs = example.call({**given, **more})
        with torch.no_grad():
            return [one for one in pytree.tree_leaves(net(*args, **kwargs)) if isinstance(one, Tensor)]

    expected = answer()
    for name in ("range", "counted"):
        found = answer(position_ids=default_input(name, mask, 0, tokens.shape[1], torch.long))
        if all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(found, expected, strict=True)):
            return name
    return None


def _free_size(example: Example, shapes: list[Any], length: int) -> int:
    """Return a number of earlier tokens that equals no other size, nor does its sum with `length`."""
    taken = {size for tensor in example.tensors for size in tensor.shape}
    taken |= {size for pair in shapes for shape, _ in pair for size in shape}
    sizes = chain(PRIMES, count(PRIMES[-1] + 1))
    return next(size for size in sizes if not taken & {size, size + length})


def _random(sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device, source: torch.Generator) -> Tensor:
    if device.type == "meta":
        return torch.empty(sizes, dtype=dtype, device=device)
    return torch.randn(sizes, generator=source).to(device, dtype)


def _prefixed(example: Example, tokens: Tensor, before: int, paired: bool) -> dict[str, Any]:
    """Return the arguments with a mask that also covers the earlier tokens, and positions that follow theirs."""
    arguments, parameters = dict(example.arguments), example.forward.parameters
    mask = "decoder_attention_mask" if paired else "attention_mask"
    given = arguments.get(mask)
    if given is None and mask in parameters and not paired:
        given = torch.ones_like(tokens)
    if isinstance(given, Tensor):
        if given.dim() != 2:
            raise TraceError(f"{mask} has {given.dim()} dimensions; with a cache it must be batch x length.")
        arguments[mask] = torch.cat([given.new_ones(given.shape[0], before), given], 1)
    if "position_ids" in parameters and "position_ids" not in arguments and not paired:
        arguments["position_ids"] = torch.arange(before, before + tokens.shape[1], device=tokens.device).repeat(
            tokens.shape[0], 1
        )
    return arguments
