"""Makes example inputs for a transformers model, from its configuration and the signature of its `forward`.

The library's own `dummy_inputs` are token ids only, for any model; its exporters ask the caller. Sizes here are small,
coprime where the architecture leaves them free, and as configured where it does not (images, Whisper's spectrograms).
A language model that may also take an image is traced on text; a dual encoder such as CLIP needs both.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peftgraph.errors import TraceError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH, LENGTH, TARGET = 3, 7, 5
SAMPLES = 4000  # of raw sound: a quarter of a second
FRAMES = 64  # of a spectrogram whose length is free


def example_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return keyword inputs to trace `model` with.

    Raises:
        TraceError: the model needs an input that its configuration does not describe.
    """
    config, main = model.config, model.main_input_name
    accepted = inspect.signature(model.forward).parameters
    dual = main != "pixel_values" and hasattr(config, "vision_config") and hasattr(config, "projection_dim")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        inputs = _main_inputs(main, config, model)
        if main == "input_ids" and dual and "pixel_values" in accepted:
            inputs["pixel_values"] = _image(config.vision_config)
        if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
            inputs["decoder_input_ids"] = _ids(config.get_text_config(decoder=True), TARGET)
    if "input_ids" in inputs and "attention_mask" in accepted:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    _require_all(inputs, accepted, model)
    return {name: value.to(model.device) for name, value in inputs.items() if name in accepted}


def _main_inputs(main: str, config: Any, model: PreTrainedModel) -> dict[str, Tensor]:
    if main == "input_ids":
        return {"input_ids": _ids(config.get_text_config(), LENGTH)}
    if main == "pixel_values":
        return {"pixel_values": _image(getattr(config, "vision_config", config))}
    if main == "input_features":
        return {"input_features": _spectrogram(config)}
    if main == "input_values" and hasattr(config, "num_mel_bins"):
        return {"input_values": torch.randn(BATCH, int(getattr(config, "max_length", 1024)), config.num_mel_bins)}
    if main == "input_values":
        return {"input_values": torch.randn(BATCH, SAMPLES)}
    raise _unknown(model, main)


def _ids(config: Any, length: int) -> Tensor:
    vocabulary = int(config.vocab_size)
    longest = getattr(config, "max_position_embeddings", None) or length
    return torch.randint(min(3, vocabulary - 1), vocabulary, (BATCH, min(length, int(longest))))


def _image(config: Any) -> Tensor:
    size = getattr(config, "image_size", None) or 224
    if isinstance(size, Mapping):
        size = (size["height"], size["width"])
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(BATCH, int(getattr(config, "num_channels", 3)), int(height), int(width))


def _spectrogram(config: Any) -> Tensor:
    bins = getattr(config, "num_mel_bins", None)
    if bins and hasattr(config, "max_source_positions") and not hasattr(config, "input_feat_per_channel"):
        return torch.randn(BATCH, int(bins), 2 * int(config.max_source_positions))  # Whisper takes exactly this many
    features = (
        getattr(config, "input_feat_per_channel", None)
        or getattr(config, "feature_projection_input_dim", None)
        or bins
        or 80
    )
    return torch.randn(BATCH, FRAMES, int(features))


def _require_all(
    inputs: Mapping[str, Tensor], accepted: Mapping[str, inspect.Parameter], model: PreTrainedModel
) -> None:
    free = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    for name, parameter in accepted.items():
        if parameter.default is parameter.empty and parameter.kind not in free and name not in inputs:
            raise _unknown(model, name)


def _unknown(model: PreTrainedModel, name: str) -> TraceError:
    return TraceError(
        f"{type(model).__name__}.forward needs {name!r}, which its configuration does not describe. "
        "Trace it from Python: pg.trace(model, example)."
    )
