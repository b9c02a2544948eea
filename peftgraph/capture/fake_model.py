"""A ghost of a model: its modules around fake tensors, so that tracing copies and touches nothing."""

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
    """A deep copy of `model`, in training mode, whose tensors are fake and whose `own` dtype became `marker`.

    Ties survive, because one tensor becomes one fake tensor. Tensors that are plain attributes are constants
    of the code: they are shared, and neither `.to()` nor the marker moves them.

    Raises:
        TraceError: the model holds something that cannot be copied.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        memo |= {id(value): value.detach() for value in vars(module).values() if isinstance(value, Tensor)}
    for tensor in [*model.parameters(), *model.buffers()]:
        memo[id(tensor)] = fake_tensor_like(tensor, mode, own, marker)
    try:
        ghost = copy.deepcopy(model, memo)
    except Exception as error:
        raise TraceError(
            f"{type(model).__name__} cannot be deep-copied ({type(error).__name__}: {error}). Remove what it "
            "holds that cannot be copied (open files, locks, tensors with a gradient history) before tracing."
        ) from error
    give_own_caches(ghost, memo)
    ask_for_no_cache(ghost)
    return ghost.train()


def ask_for_no_cache(copied: nn.Module) -> None:
    """Takes a cache of keys and values out of the settings of a copy: the example asks for one by an argument, as a
    call does."""
    for module in copied.modules():
        settings: Any = getattr(module, "config", None)
        if getattr(settings, "use_cache", None) is True:
            settings.use_cache = False


def give_own_caches(copied: nn.Module, memo: dict[int, Any]) -> None:
    """Gives a deep copy, in place, caches of its own for the results of its methods (`functools.lru_cache`), which a
    copy shares with the original: what one run leaves there, such as a mask or a fake tensor, another would read.

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
    """Lets code know that its values are no real ones, as an export does: caches that all models share, such as a
    function's own, must not keep them."""
    before = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = True
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = before


def fake_tensor_like(tensor: Tensor, mode: FakeTensorMode, own: torch.dtype, marker: torch.dtype) -> Tensor:
    """A fake tensor of the same shape and device; dtype `own` becomes `marker`."""
    dtype = marker if tensor.dtype == own else tensor.dtype
    with mode:
        fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device=tensor.device)
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(fake, requires_grad=tensor.requires_grad)
    return fake


def fake_arguments(
    arguments: dict[str, Any], mode: FakeTensorMode, own: torch.dtype, marker: torch.dtype
) -> dict[str, Any]:
    """The arguments of a call with fake tensors in place of real ones."""

    def fake(value: Any) -> Any:
        return fake_tensor_like(value, mode, own, marker) if isinstance(value, Tensor) else value

    return {name: pytree.tree_map(fake, value) for name, value in arguments.items()}
