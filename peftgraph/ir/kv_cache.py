"""Keys and values of earlier calls: how a graph takes and returns them, and the transformers cache that holds them.

In a graph they are plain tensors, two for each layer; a cache is read before a call and written after it. Keys and
values of cross-attention are not among them: they depend on the encoder alone (`runtime/encoder_decoder.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftgraph.errors import CallError


@functools.cache
def _ahead() -> type[Any]:
    """Return the class of cache layers that store rows which belong to no token before those of the cached tokens."""
    from transformers.cache_utils import DynamicLayer

    class Ahead(DynamicLayer):
        rows = 0

        def get_seq_length(self) -> int:
            return max(super().get_seq_length() - self.rows, 0)

        def crop(self, *args: int, **kwargs: int) -> None:
            (count,) = (*args, *kwargs.values())  # how many tokens to remove, as a negative number, or to keep
            keys, values = self.keys, self.values
            if keys is not None and values is not None and count:
                kept = max(count + (self.rows if count > 0 else keys.shape[-2]), 0)
                self.keys, self.values = keys[..., :kept, :], values[..., :kept, :]

    return Ahead


@dataclass(frozen=True)
class KVCacheSpec:
    """Describes how a program takes and returns the keys and values of earlier calls.

    Attributes:
        argument: the parameter of `forward`, and the field of its output, that holds the cache.
        layers: the layers of the cache that hold keys and values; layers that share another's hold none.
        paired: whether an encoder-decoder's cache of two is there.
    """

    argument: str
    layers: tuple[int, ...]
    paired: bool = False

    @property
    def tokens(self) -> str:
        """Returns the parameter of `forward` that holds the tokens being cached."""
        return "decoder_input_ids" if self.paired else "input_ids"

    def cache(self, tensors: Sequence[Tensor] = ()) -> Any:
        """Make a transformers cache that holds these keys and values, alternating by layer; an empty one if there are
        none."""
        from transformers import DynamicCache, EncoderDecoderCache

        class Passing(DynamicCache):
            """Stores nothing for cross-attention, so that each call computes it from the encoder's output."""

            def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
                return key_states, value_states

        cache = EncoderDecoderCache(DynamicCache(), Passing()) if self.paired else DynamicCache()
        if tensors:
            self.write(cache, tensors)
        return cache

    def read(self, cache: Any) -> list[Tensor]:
        """Return the keys and values in a cache, alternating by layer; an empty list for an empty cache.

        Raises:
            CallError: it keeps them in a form that the graph does not take.
        """
        from transformers.cache_utils import DynamicLayer

        layers = self._own(cache).layers
        held = [layers[i] for i in self.layers if i < len(layers) and layers[i].is_initialized]
        if not held:
            return []
        whole = len(held) == len(self.layers) and all(type(layer) in (DynamicLayer, _ahead()) for layer in held)
        if not whole:
            raise CallError(
                f"{self.argument} holds {len(held)} layers of {type(held[0]).__name__}; this program reads and "
                f"writes the full keys and values of {len(self.layers)} in a DynamicCache(). Leave the argument out."
            )
        return [tensor for layer in held for tensor in (layer.keys, layer.values)]

    def prepended_rows(self, cache: Any) -> int:
        """Return how many cached rows belong to no token; they precede those of tokens."""
        return max((getattr(layer, "rows", 0) for layer in self._own(cache).layers), default=0)

    def write(self, cache: Any, tensors: Sequence[Tensor], rows: int = 0) -> None:
        """Write keys and values into a cache, in place; a layer that would drop old ones is replaced by one that keeps
        them.

        Args:
            cache: a transformers cache.
            tensors: keys and values, in turn for each layer.
            rows: how many of each belong to no token; the length that the cache reports does not count them.
        """
        from transformers.cache_utils import DynamicLayer

        layers, kind = self._own(cache).layers, _ahead() if rows else DynamicLayer
        for i, keys, values in zip(self.layers, tensors[::2], tensors[1::2], strict=True):
            layers += [DynamicLayer() for _ in range(i + 1 - len(layers))]
            if type(layers[i]) is not kind:
                layers[i] = kind()
            if rows:
                layers[i].rows = rows
            layers[i].keys, layers[i].values, layers[i].is_initialized = keys, values, True
            layers[i].dtype, layers[i].device = keys.dtype, keys.device

    def _own(self, cache: Any) -> Any:
        from transformers import DynamicCache, EncoderDecoderCache

        own = cache.self_attention_cache if self.paired and isinstance(cache, EncoderDecoderCache) else cache
        if not isinstance(own, DynamicCache):
            raise CallError(f"{self.argument} is a {type(own).__name__}; this program takes a DynamicCache().")
        return own


def default_input(name: str, mask: Tensor, before: int, length: int, dtype: torch.dtype) -> Tensor:
    """Return the value that a model uses for an input that a call with a cache omits.

    Args:
        name: "ones", a mask that hides nothing; "range", positions from the earlier tokens on; "counted", positions
            that count only the tokens that the mask keeps.
        mask: (B, P + S) over the earlier tokens and those of the call; for "ones" any tensor of B rows.
        before: P, the earlier tokens.
        length: S, the tokens of the call.
        dtype: of the result.
    """
    if name == "ones":
        return torch.ones(mask.shape[0], before + length, dtype=dtype, device=mask.device)
    if name == "range":
        return torch.arange(before, before + length, dtype=dtype, device=mask.device).expand(mask.shape[0], -1)
    assert name == "counted", name
    return (mask.cumsum(1) * mask - 1)[:, -length:].to(dtype)
