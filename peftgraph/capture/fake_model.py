"""A fake copy of a model: its modules around fake tensors, so that tracing copies no weights and changes nothing."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from peftgraph.errors import TraceError

CACHED = type(functools.lru_cache(len))


def fake_copy_of(model: nn.Module, mode: FakeTensorMode, own: torch.dtype, marker: torch.dtype) -> nn.Module:
    """Return a deep copy of `model`, in training mode, whose tensors are fake and whose `own` dtype became `marker`.

    Ties are kept, because one tensor becomes one fake tensor. Tensors that are plain attributes are constants of the
    code: they are shared, and neither `.to()` nor the marker moves them.

    Raises:
        TraceError: the model contains something that cannot be copied.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        memo |= {id(value): value.detach() for value in vars(module).values() if isinstance(value, Tensor)}
    for tensor in [*model.parameters(), *model.buffers()]:
        memo[id(tensor)] = fake_tensor_like(tensor, mode, own, marker)
    try:
        copied = copy.deepcopy(model, memo)
    except Exception as error:
        raise TraceError(
            f"{type(model).__name__} cannot be deep-copied ({type(error).__name__}: {error}). Remove what it "
            "holds that cannot be copied (open files, locks, tensors with a gradient history) before tracing."
        ) from error
    give_own_caches(copied, memo)
    ask_for_no_cache(copied)
    return copied.train()


def ask_for_no_cache(copied: nn.Module) -> None:
    """Switch off the cache of keys and values in the configuration of a copy: an example asks for it by an argument."""
    for module in copied.modules():
        settings: Any = getattr(module, "config", None)
        if getattr(settings, "use_cache", None) is True:
            settings.use_cache = False


def give_own_caches(copied: nn.Module, memo: dict[int, Any]) -> None:
    """Give a deep copy, in place, caches of its own for the results of its methods (`functools.lru_cache`), which it
    would otherwise share with the original: values that one run leaves there, such as a fake tensor, would be read by
    another.

    Args:
        copied: the copy.
        memo: of the deep copy that made it.
    """
    for module in copied.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, CACHED):
                function = copy.deepcopy(value.__wrapped__, memo)
                vars(module)[name] = functools.lru_cache(**value.cache_parameters())(function)


@contextmanager
def compiling_flag_set() -> Iterator[None]:
    """Set the flag by which code knows that it is being exported, so that caches which all models share, such as a
    function's own, do not keep fake values."""
    before = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = True
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = before


def fake_tensor_like(tensor: Tensor, mode: FakeTensorMode, own: torch.dtype, marker: torch.dtype) -> Tensor:
    """Return a fake tensor of the same shape and device; dtype `own` becomes `marker`."""
    dtype = marker if tensor.dtype == own else tensor.dtype
    with mode:
        fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device=tensor.device)
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(fake, requires_grad=tensor.requires_grad)
    return fake


def fake_arguments(
    arguments: dict[str, Any], mode: FakeTensorMode, own: torch.dtype, marker: torch.dtype
) -> dict[str, Any]:
    """Return the arguments of a call with fake tensors in place of real ones."""

    def fake(value: Any) -> Any:
        return fake_tensor_like(value, mode, own, marker) if isinstance(value, Tensor) else value

    return {name: pytree.tree_map(fake, value) for name, value in arguments.items()}
