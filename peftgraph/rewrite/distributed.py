"""Reads and writes parameters that may be sharded over processes, and makes decisions that all processes share."""

from __future__ import annotations

import torch
import torch.distributed
from torch import Tensor

try:
    from torch.distributed.tensor import DTensor, distribute_tensor
except ImportError:  # a build of torch without distributed
    DTensor = distribute_tensor = None

WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def plain_name(name: str) -> str:
    """Return the name of a parameter without what wrappers put into it."""
    for wrapper in WRAPPERS:
        if name.startswith(wrapper):
            name = name.removeprefix(wrapper)
        name = name.replace(f".{wrapper}", ".")
    return name


def full(tensor: Tensor) -> Tensor:
    """Return all values of a tensor, gathered from every process where it is sharded; gradients flow to the shards."""
    return tensor.full_tensor() if DTensor is not None and isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def assign(target: Tensor, values: Tensor) -> None:
    """Write all values of a tensor, in place; each process keeps its own shard."""
    if DTensor is not None and isinstance(target, DTensor):
        assert distribute_tensor is not None
        values = distribute_tensor(values.contiguous(), target.device_mesh, target.placements)
    target.copy_(values)


def agreed(values: Tensor) -> Tensor:
    """Return the first process's values, on every process."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        values = values.clone()
        torch.distributed.broadcast(values, src=0)
    return values
