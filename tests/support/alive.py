"""What a forward pass keeps in memory for the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Watch(TorchDispatchMode):
    """Every storage that an operation made, with its size."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:
                storage = tensor.untyped_storage()
                self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result


def kept_bytes(loss_of: Callable[[], Tensor]) -> int:
    """The bytes that are still there once the loss is known: what its gradients need, held in whatever way.

    Args:
        loss_of: runs the model and gives the loss alone.
    """
    with _Watch() as watch:
        loss = loss_of()
    assert loss.requires_grad
    return sum(size for reference, size in watch.made.values() if not reference.expired())
