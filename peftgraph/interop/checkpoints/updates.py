"""Defines what an adapter changes in a checkpoint: the interface between adapter formats and the writing of shards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from torch import Tensor

from peftgraph.errors import PeftGraphError
from peftgraph.interop.checkpoints.storage_layout import StorageLayout, StoredParameter
from peftgraph.interop.checkpoints.tensor_file import FLOATS

Read = Callable[[str], Tensor]


class Updates(Protocol):
    """New values for the stored tensors of a checkpoint."""

    @property
    def changed(self) -> Mapping[str, tuple[str, ...]]:
        """The stored tensors that change, each with the tensors that its new value is computed from."""
        ...

    def value(self, key: str, read: Read) -> Tensor:
        """Compute the new value of a stored tensor, in its shape and dtype.

        Args:
            key: one of `changed`.
            read: returns a stored tensor, one of those that `changed` lists for the key, in memory that may be reused.
        """
        ...

    def report(self) -> str:
        """Say what changes, or what was proved about it, in lines for the user."""
        ...


def stored_as(layout: StorageLayout, names: Sequence[str], shape: Iterable[int]) -> StoredParameter:
    """Return how a parameter that changes is stored.

    Args:
        layout: of the model's weights.
        names: of the parameter, as `StorageLayout.find` takes them.
        shape: of the parameter in the model.

    Raises:
        PeftGraphError: it is not stored, in another shape, or not in a floating dtype.
    """
    stored, folder = layout.find(names), layout.checkpoint.folder
    if stored is None:
        raise PeftGraphError(
            f"{folder} stores no {names[0]}, which the adapter changes: the model makes it of other tensors when it is "
            "loaded, and not by stacking them alone, or not all weights are there. Such a model is merged in memory: "
            "--whole, or merge_and_unload with an adapter that only peft reads."
        )
    key, wanted = stored.pieces[0].key, tuple(shape)
    slot = layout.checkpoint.slot(key)
    if stored.pieces[0].last is None and slot.shape != wanted:  # those of several pieces are known to fit
        raise PeftGraphError(f"{key} has shape {slot.shape} in {folder}; the adapter fits {wanted}.")
    if slot.dtype not in FLOATS:
        raise PeftGraphError(
            f"{key} is stored as {slot.dtype} in {folder}. Only {', '.join(FLOATS)} weights are merged; a "
            "quantised one would have to be rounded again. Merge into the weights that were quantised."
        )
    return stored
