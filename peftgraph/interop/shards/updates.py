"""What an adapter changes in a checkpoint: the seam between the formats of adapters and the writing of shards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from torch import Tensor

from peftgraph.errors import PeftGraphError
from peftgraph.interop.shards.checkpoint import Checkpoint
from peftgraph.interop.shards.tensor_file import FLOATS

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
            read: gives a stored tensor, among those that `changed` lists for it.
        """
        ...


def stored_key(checkpoint: Checkpoint, names: Sequence[str], prefix: str) -> str:
    """Under which name a parameter that changes is stored.

    Args:
        checkpoint: the model's weights.
        names: of the parameter, as `Checkpoint.key` takes them.
        prefix: likewise.

    Raises:
        PeftGraphError: under none.
    """
    key = checkpoint.key(names, prefix)
    if key is None:
        raise PeftGraphError(
            f"{checkpoint.folder} stores no {names[0]}, which the adapter changes: the model makes it of other tensors "
            "when it is loaded, or not all weights are there. Such a model is merged in memory: --whole for an "
            "adapter of this library, merge_and_unload for one of peft."
        )
    return key


def check_stored(checkpoint: Checkpoint, key: str, shape: Iterable[int]) -> None:
    """Refuses a change of a tensor that is stored in another shape, or not as floating numbers.

    Raises:
        PeftGraphError: it is.
    """
    slot, wanted = checkpoint.slot(key), tuple(shape)
    if slot.shape != wanted:
        raise PeftGraphError(f"{key} has shape {slot.shape} in {checkpoint.folder}; the adapter fits {wanted}.")
    if slot.dtype not in FLOATS:
        raise PeftGraphError(
            f"{key} is stored as {slot.dtype} in {checkpoint.folder}. Only {', '.join(FLOATS)} weights are merged; a "
            "quantised one would have to be rounded anew. Merge into the weights that were quantised."
        )
