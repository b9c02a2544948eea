"""Example inputs of any model of transformers, by the names of what its `forward` takes."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .calls import BATCH, FRAMES, LENGTH, SOUND, TARGET, Form, more, whole
from .packed import GRID, PICTURES, derived, patches


def accepted(model: nn.Module) -> dict[str, Any]:
    """Keyword inputs of one call: the first form that `model` accepts.

    Raises:
        ValueError: it accepts none; the message of the first form is given.
    """
    assert isinstance(model, PreTrainedModel)
    first: Exception | None = None
    state = model.training
    model.eval()
    try:
        for form in Inputs(model).forms():
            try:
                given = form()
                with torch.no_grad():
                    model(**given)
                return given
            except Exception as error:  # any model, any complaint: the next form is tried
                first = first or error
    finally:
        model.train(state)
    assert first is not None
    raise ValueError(f"no form of example inputs fits: {type(first).__name__}: {first}") from first


class Inputs:
    """Forms of a call, the likeliest first."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.config = model, model.config
        self.takes = inspect.signature(model.forward).parameters
        self.random = torch.Generator().manual_seed(1)

    def forms(self) -> Iterator[Any]:
        """Functions that make the inputs."""
        special = whole(self)
        if special is not None:
            yield lambda: special
            return
        text = "input_ids" in self.takes
        if self.takes.keys() & {"grid_thw", "image_grid_thw"}:
            yield from self.packed(text)
        shapes = {name: list(self.shapes(name)) for name in SIGNALS if name in self.takes}
        yield from self.signals(shapes, text)
        if text:
            yield lambda: self.call({}, True)
        for name in shapes if len(shapes) > 1 else ():
            yield from self.signals({name: shapes[name]}, text)
        if "hidden_states" in self.takes:
            yield lambda: {"hidden_states": self.noise(BATCH, LENGTH, self.width())}
        if "inputs_embeds" in self.takes:
            yield lambda: self.more({"inputs_embeds": self.noise(BATCH, LENGTH, self.width())})

    def signals(self, shapes: Mapping[str, list[tuple[int, ...]]], text: bool) -> Iterator[Any]:
        """Calls with one signal of each name, in every combination of their shapes."""
        for choice in product(*shapes.values()) if shapes else ():
            chosen = dict(zip(shapes, choice, strict=True))
            if text:
                yield lambda chosen=chosen: self.call(chosen, True)
            yield lambda chosen=chosen: self.call(chosen, False)

    def call(self, shapes: Mapping[str, tuple[int, ...]], text: bool) -> Form:
        """One call with signals of these shapes, with or without tokens."""
        found = {name: self.noise(*shape) for name, shape in shapes.items()}
        for name, value in list(found.items()):
            for mask in (f"{name}_mask", "attention_mask"):
                required = mask in self.takes and self.takes[mask].default is inspect.Parameter.empty
                if required and "input_ids" not in self.takes:
                    found[mask] = torch.ones(value.shape[0], max(value.shape[1:]), dtype=torch.long)
        found |= more(self, found)
        if text:
            found |= self.text(found)
        return self.more(found)

    def packed(self, text: bool) -> Iterator[Any]:
        """Calls with the patches of all pictures in one row."""
        prefix = "image_" if "image_grid_thw" in self.takes else ""
        pixels = "pixel_values" if "pixel_values" in self.takes else "hidden_states"
        for shape in patches(getattr(self.config, "vision_config", self.config), PICTURES):
            for axes in ((3,), (), None) if text else (None,):
                for given in (True, False):
                    yield lambda shape=shape, axes=axes, given=given: self.grids(prefix, pixels, shape, axes, given)

    def grids(
        self, prefix: str, pixels: str, shape: tuple[int, ...], axes: tuple[int, ...] | None, given: bool
    ) -> Form:
        """One such call. `axes`: of the positions that stand before those of the batch; None: no positions.
        `given`: with what the model would work out from the grids."""
        grid = torch.tensor([GRID] * PICTURES)
        found = {pixels: self.noise(*shape), f"{prefix}grid_thw": grid}
        if "input_ids" in self.takes:
            found |= self.text(found)
            kinds = found["input_ids"] == self._token("image")
            if axes is not None:
                length = found["input_ids"].shape[1]
                found["position_ids"] = torch.arange(length).expand(*axes, BATCH, length).contiguous()
            elif "mm_token_type_ids" in self.takes:
                found["mm_token_type_ids"] = kinds.long()
        if given:
            found |= derived(self.model, found, prefix)
        return found

    def more(self, found: Form) -> Form:
        """What else a model wants."""
        if "decoder_input_ids" in self.takes and "decoder_input_ids" not in found:
            found["decoder_input_ids"] = self.ids(TARGET)
        if "bbox" in self.takes and "input_ids" in found:
            corner = torch.randint(0, 20, (*found["input_ids"].shape, 2), generator=self.random)
            found["bbox"] = torch.cat([corner, corner + 9], -1)
        return found

    def shapes(self, name: str) -> Iterator[tuple[int, ...]]:
        """Shapes that an input may have."""
        if name.startswith("pixel_values"):
            yield from self.pictures(name)
        elif name == "input_features":
            for bins in dict.fromkeys(
                self.numbers("num_mel_bins", "feature_size", "input_dim", "input_feat_per_channel") or [10]
            ):
                yield from ((BATCH, FRAMES, bins), (BATCH, bins, 64), (BATCH, 1, 32, bins), (BATCH, bins, FRAMES))
        elif name == "input_values":
            bins = (self.numbers("num_mel_bins", "feature_size") or [10])[0]
            yield from ((BATCH, SOUND), (BATCH, 1, SOUND), (BATCH, 32, bins))

    def pictures(self, name: str) -> Iterator[tuple[int, ...]]:
        channels = (self.numbers("num_channels", "in_channels", "in_chans") or [3])[0]
        frames = (self.numbers("num_frames") or [4])[0]
        for size in dict.fromkeys([*self.numbers("image_size"), 64, 96, 224]):
            picture = (channels, size, size)
            if "video" not in name:
                yield (BATCH, *picture)
            if size <= 96:
                yield (BATCH, frames, *picture)

    def numbers(self, *names: str) -> list[int]:
        """Values of fields of the configuration and of those inside it."""
        inner = [value for value in vars(self.config).values() if hasattr(value, "model_type")]
        found: list[int] = []
        for config in (self.config, *inner):
            for name in names:
                value = getattr(config, name, None)
                value = value[0] if isinstance(value, list | tuple) and value else value
                if isinstance(value, int) and value:
                    found.append(value)
        return found

    def width(self) -> int:
        return (self.numbers("hidden_size", "d_model", "embed_dim") or [48])[0]

    def ids(self, length: int) -> torch.Tensor:
        return torch.randint(3, 50, (BATCH, length), generator=self.random)

    def noise(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.random)

    def text(self, found: Mapping[str, torch.Tensor]) -> Form:
        """Token ids, with as many placeholders as the pictures or sounds need."""
        ids = self.ids(LENGTH)
        for key, value in found.items():
            modality = SIGNALS.get(key)
            token = None if modality is None else self._token(modality)
            if token is not None and modality is not None:
                count = self._features(modality, value, found)
                ids = torch.cat([ids[:, :2], torch.full((BATCH, count), token), ids[:, 2:]], dim=1)
        given = {"input_ids": ids}
        if "attention_mask" in self.takes:
            given["attention_mask"] = torch.ones_like(ids)
        return given

    def _token(self, modality: str) -> int | None:
        for name in (f"{modality}_token_id", f"{modality}_token_index"):
            if isinstance(getattr(self.config, name, None), int):
                return getattr(self.config, name)
        return None

    def _features(self, modality: str, value: torch.Tensor, found: Mapping[str, torch.Tensor]) -> int:
        """How many placeholders one input of the batch takes."""
        get = getattr(self.model, f"get_{modality}_features", None)
        get = get or getattr(self.model.base_model, f"get_{modality}_features")
        with torch.no_grad():
            takes = inspect.signature(get).parameters.keys() - {
                key for key, kept in SIGNALS.items() if kept == modality
            }
            out = get(value, **{key: found[key] for key in takes & found.keys()})
        pooled = getattr(out, "pooler_output", out)
        out = out.last_hidden_state if pooled is None else pooled
        parts = list(out) if isinstance(out, list | tuple) else [out]
        return sum(math.prod(part.shape[:-1]) for part in parts) // BATCH


SIGNALS = {
    "pixel_values": "image",
    "pixel_values_videos": "video",
    "input_features": "audio",
    "input_values": "audio",
}
