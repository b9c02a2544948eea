"""Modules whose parameters are sharded over processes (`torch.distributed.fsdp.fully_shard`).

FSDP gathers the parameters of a module when it is called. Modules of a program that are neither its root nor blocks
hold tensors and are never called, so the root gathers theirs before its code reads them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from peftgraph.errors import PeftGraphError
from peftgraph.ir.tensor_table import TensorTable
from peftgraph.rewrite.distributed import full, plain_name
from peftgraph.runtime.block_module import BlockModule

try:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor, Partial, Replicate
except ImportError:  # a build of torch without distributed
    FSDPModule = DTensor = Partial = Replicate = None


ELSEWHERE = "_peftgraph_elsewhere"  # an attribute of a program's parameter whose values are in a sharded module


def is_sharded(module: nn.Module) -> bool:
    """Whether `fully_shard` was called on a module itself."""
    return FSDPModule is not None and isinstance(module, FSDPModule)


def gathered(tensor: Tensor) -> Tensor:
    """Return a whole tensor for code outside of the block that owns it; gradients of processes are averaged."""
    if DTensor is None or not isinstance(tensor, DTensor):
        return tensor
    assert Partial is not None
    assert Replicate is not None
    mesh = tensor.device_mesh
    whole = tensor.redistribute(placements=[Replicate()] * mesh.ndim).to_local(grad_placements=[Partial()] * mesh.ndim)
    if whole.requires_grad:
        whole.register_hook(lambda grad: grad / mesh.size())
    return whole


@torch.no_grad()
def read_back(table: TensorTable, net: nn.Module) -> None:
    """Write the values of a sharded module's trained tensors into those of its program; every process has all.

    Raises:
        PeftGraphError: the module lacks one of them.
    """
    found = {plain_name(name): value for name, value in net.named_parameters(remove_duplicate=False)}
    found |= {plain_name(name): value for name, value in net.named_buffers(remove_duplicate=False)}
    for name, target in {**table.trainable, **table.state}.items():
        if name not in found:
            raise PeftGraphError(f"The module has no {name}: it was made of another program.")
        value = full(found[name])
        if value is not target:
            target.copy_(value)
        vars(target).pop(ELSEWHERE, None)


def check_read_back(table: TensorTable) -> None:
    """Refuse a program whose tensors train in a sharded module.

    Raises:
        PeftGraphError: they were not read back.
    """
    away = next((name for name, value in table.trainable.items() if hasattr(value, ELSEWHERE)), None)
    if away is not None:
        raise PeftGraphError(
            f"{away} and the other parameters of this program train as shards, in a module that fully_shard was called "
            "on, and their values here are those of the start. Call tuned.gather(net) first, on every process."
        )


def mark_elsewhere(trainable: Mapping[str, nn.Parameter]) -> None:
    """Mark the parameters of a program that a module trains as shards of its own."""
    for value in trainable.values():
        setattr(value, ELSEWHERE, True)


@contextmanager
def gathered_holders(net: nn.Module) -> Iterator[None]:
    """Gather the tensors of the modules that are not called themselves, while the code of a sharded module runs.

    Where gradients are recorded they stay gathered until the backward pass is over, as those of the root do.

    Raises:
        PeftGraphError: a part of a block is sharded by itself.
    """
    holders: list[Any] = list(_holders(net))
    for one in holders:
        one.unshard()
    try:
        yield
    finally:
        if not torch.is_grad_enabled():
            for one in holders:
                one.reshard()


def compute_dtype(net: nn.Module, default: torch.dtype) -> torch.dtype:
    """Return the dtype in which the parameters of a sharded module are gathered."""
    state: Any = getattr(net, "_get_fsdp_state")()  # noqa: B009 - not in the stubs of torch
    return state._mp_policy.param_dtype or default


def local_device(net: nn.Module, default: torch.device) -> torch.device:
    """Return where this process's shards are."""
    return next((one.device for one in net.parameters()), default)


def _holders(net: nn.Module) -> Iterator[nn.Module]:
    """Yield the sharded modules below the root that are not blocks."""
    for name, module in net.named_modules():
        if module is net or not is_sharded(module) or isinstance(module, BlockModule):
            continue
        parents = name.split(".")[:-1]
        for end in range(1, len(parents) + 1):
            if isinstance(net.get_submodule(".".join(parents[:end])), BlockModule):
                raise PeftGraphError(
                    f"{name} is sharded by itself, and its block {'.'.join(parents[:end])} runs as one piece of code. "
                    "Shard blocks as a whole: fully_shard(block) for each, then fully_shard(net)."
                )
        yield module
