"""Calls of the sizes that were not traced: the example's tensors, repeated or cut along every axis that is free."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from peftgraph.capture.example_inputs import Example
from peftgraph.ir.signature import Signature

STEPS = (4, -2, 8, 1, 2, 6, 3, 5, 12, -1, -3, -4)  # added to a size of the example, in this order of preference
BATCHES = (2, 5, 4, 3, 7)
TRIES = 20_000


def free_sizes(signature: Signature, example: Example) -> dict[str, int]:
    """Return the free sizes as the example has them, by name."""
    tensors = {leaf.key: leaf.value for leaf in example.leaves if isinstance(leaf.value, Tensor)}
    return {
        dim: size
        for spec in signature.inputs
        for dim, size in zip(spec.dims, tensors[spec.key].shape, strict=True)
        if isinstance(dim, str)
    }


def other_sizes(signature: Signature, example: Example) -> Iterator[dict[str, int]]:
    """Yield other values for all free sizes that the signature allows, best first, alternately larger and smaller than
    the example's. Sizes that are equal in the example stay equal."""
    now = free_sizes(signature, example)
    free = list(dict.fromkeys(now.values()))
    batches = {now[dim] for dim in now if dim.startswith("B")}
    candidates = [_candidates(size, size in batches) for size in free]
    for chosen in itertools.islice(itertools.product(*candidates), TRIES):
        renamed = dict(zip(free, chosen, strict=True))
        sizes = {dim: renamed[size] for dim, size in now.items()}
        if len(set(chosen)) == len(chosen) and sizes_allowed(signature, sizes):
            yield sizes


def smallest_free_sizes(signature: Signature, example: Example) -> dict[str, int]:
    """Return 1 for every free size that may be 1, and the example's value for the others."""
    return {
        dim: 1 if signature.ranges.get(dim, (1, None))[0] <= 1 else n
        for dim, n in free_sizes(signature, example).items()
    }


def sizes_allowed(signature: Signature, sizes: Mapping[str, int]) -> bool:
    """Tell whether a call may have these sizes."""
    for dim, size in sizes.items():
        low, high = signature.ranges.get(dim, (1, None))
        if size < low or (high is not None and size > high):
            return False
    return all(one.holds(sizes) for one in signature.conditions)


def resize_example(signature: Signature, example: Example, sizes: Mapping[str, int]) -> Example:
    """Return the example with its tensors repeated or cut to `sizes`."""
    dims = {spec.key: spec.dims for spec in signature.inputs}
    keys = iter([leaf.key for leaf in example.leaves])

    def resize(value: Any) -> Any:
        key = next(keys)
        if not isinstance(value, Tensor):
            return value
        for axis, dim in enumerate(dims[key]):
            if isinstance(dim, str) and sizes[dim] != value.shape[axis]:
                chosen = torch.arange(sizes[dim], device=value.device) % value.shape[axis]
                value = value.index_select(axis, chosen)
        return value

    return example.with_arguments({name: pytree.tree_map(resize, value) for name, value in example.arguments.items()})


def other_masks(example: Example) -> Iterator[tuple[Example, str]]:
    """Yield the example with other masks, each described: without padding where it has some, and with padding where it
    has none. Code that omits a mask which hides nothing does not do so while it is traced.

    A mask is an input of two dimensions or more that holds zeros and ones alone.
    """
    for leaf in example.leaves:
        mask = leaf.value
        if not isinstance(mask, Tensor) or mask.dim() < 2 or mask.is_floating_point() or mask.is_complex():
            continue
        if mask.is_meta or not mask.numel() or not bool(((mask == 0) | (mask == 1)).all()):
            continue
        first = mask.flatten()[0]
        if bool((mask == first).all()):
            other = mask.clone()
            other[-1, ..., -(mask.shape[-1] // 3 or 1) :] = 1 - int(first)
            yield _with(example, leaf.key, other), f" with other values at the end of {leaf.key}"
            continue
        for value in (1, 0) if mask.dtype == torch.bool else (1,):
            yield _with(example, leaf.key, torch.full_like(mask, value)), f" with {leaf.key} all {value}"


def _with(example: Example, key: str, value: Tensor) -> Example:
    keys = iter([leaf.key for leaf in example.leaves])

    def change(old: Any) -> Any:
        return value if next(keys) == key else old

    return example.with_arguments({name: pytree.tree_map(change, one) for name, one in example.arguments.items()})


def _candidates(size: int, batch: bool) -> list[int]:
    if batch:
        return [one for one in BATCHES if one != size]
    return [size + step for step in STEPS if size + step > 1]
