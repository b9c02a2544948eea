"""What an adapter changes in a checkpoint: the seam between the formats of adapters and the writing of shards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from torch import Tensor

from peftgraph.errors import PeftGraphError
from peftgraph.interop.checkpoints.layout import Layout, Stored
from peftgraph.interop.checkpoints.tensor_file import FLOATS

Read = Callable[[str], Tensor]


class Updates(Protocol):
    """New values for stored tensors."""

    @property
    def changed(self) -> Mapping[str, tuple[str, ...]]:
        """The stored tensors that change, each with those that its new value is computed from."""
        ...

    def value(self, key: str, read: Read) -> Tensor:
        """The new value of a stored tensor, in its shape and dtype.

        Args:
            key: one of `changed`.
            read: gives a stored tensor, among those that `changed` lists for it, in memory that is taken over.
        """
        ...


def stored_as(layout: Layout, names: Sequence[str], shape: Iterable[int]) -> Stored:
    """How a parameter that changes is stored.

    Args:
        layout: of the model's weights.
        names: of the parameter, as `Layout.find` takes them.
        shape: of the parameter in the model.

    Raises:
        PeftGraphError: not at all, in another shape, or not as floating numbers.
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
            "quantised one would have to be rounded anew. Merge into the weights that were quantised."
        )
    return stored
