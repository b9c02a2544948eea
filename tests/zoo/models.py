"""The model types of transformers as entries of the zoo: which class of a type is built, and with which example."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto as auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .entry import Entry, Group
from .overrides import CLASSES, INPUTS, UNBUILT
from .shrink import small_config
from .truth import truth

# The mappings, richest head first. An encoder is built without a head.
ENCODER_DECODERS = ("SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "TEXT_TO_SPECTROGRAM")
MULTIMODAL = (
    "MULTIMODAL_LM",
    "IMAGE_TEXT_TO_TEXT",
    "RETRIEVAL",
    "VISUAL_QUESTION_ANSWERING",
    "ZERO_SHOT_IMAGE_CLASSIFICATION",
)
ENCODERS = ("MASKED_LM", "TEXT_ENCODING")
AUDIO = (
    "CTC",
    "AUDIO_CLASSIFICATION",
    "RNNT",
    "TDT",
    "TEXT_TO_WAVEFORM",
    "AUDIO_FRAME_CLASSIFICATION",
    "AUDIO_XVECTOR",
)
VISION = (
    "IMAGE_CLASSIFICATION", "IMAGE", "BACKBONE", "MASKED_IMAGE_MODELING", "IMAGE_SEGMENTATION", "OBJECT_DETECTION",
    "DEPTH_ESTIMATION", "UNIVERSAL_SEGMENTATION", "VIDEO_CLASSIFICATION", "SEMANTIC_SEGMENTATION", "IMAGE_TO_IMAGE",
    "INSTANCE_SEGMENTATION", "KEYPOINT_DETECTION", "KEYPOINT_MATCHING", "POSE_ESTIMATION", "MASK_GENERATION",
    "ZERO_SHOT_OBJECT_DETECTION", "NORMAL_ESTIMATION", "POINTMAP_ESTIMATION", "IMAGE_MATTING", "TEXT_RECOGNITION",
    "TABLE_RECOGNITION",
)  # fmt: skip
OTHERS = (
    "PRETRAINING", "TIME_SERIES_PREDICTION", "TIME_SERIES_CLASSIFICATION", "TIME_SERIES_REGRESSION",
    "CAUSAL_IMAGE_MODELING", "TOKEN_CLASSIFICATION", "SEQUENCE_CLASSIFICATION", "QUESTION_ANSWERING",
)  # fmt: skip
BATCH, LENGTH, TARGET = 3, 7, 5


def _classes(task: str) -> Mapping[str, Any]:
    name = "MODEL_MAPPING_NAMES" if task == "" else f"MODEL_FOR_{task}_MAPPING_NAMES"
    return getattr(auto, name, {})


def choose(model_type: str) -> tuple[str, Group] | None:
    """The class to build for a type, and the group it is counted in."""
    base = _classes("").get(model_type)
    for tasks, group, bare in (
        (ENCODER_DECODERS, "encoder-decoder", False),
        (MULTIMODAL, "multimodal", False),
        (ENCODERS, "encoder", True),
        (("CAUSAL_LM",), "decoder", False),
        (AUDIO, "audio", True),
        (VISION, "vision", True),
        (OTHERS, "encoder", True),
        (("",), "encoder", True),
    ):
        found = next((_classes(task)[model_type] for task in tasks if model_type in _classes(task)), None)
        if found is not None:
            chosen = CLASSES.get(model_type, base if bare and base else found)
            return (chosen if isinstance(chosen, str) else chosen[0]), group
    return None


def build(model_type: str, name: str) -> nn.Module:
    """The tiny random model of a type, in training mode."""
    torch.manual_seed(0)
    config = small_config(model_type)
    return getattr(transformers, name)(config)


def example(model_type: str, model: nn.Module) -> dict[str, Any]:
    """Keyword inputs of one call of `model`, with sizes that differ from one another."""
    own = INPUTS.get(model_type)
    if own is not None:
        return own(model)
    return Inputs(model).given()


class Inputs:
    """Example inputs by the names of what a model's `forward` takes."""

    def __init__(self, model: nn.Module) -> None:
        assert isinstance(model, PreTrainedModel)
        self.model, self.config = model, model.config
        self.takes = inspect.signature(model.forward).parameters
        self.random = torch.Generator().manual_seed(1)

    def given(self) -> dict[str, Any]:
        """One call."""
        found: dict[str, Any] = {}
        for name in ("pixel_values", "input_features", "input_values"):
            if name in self.takes:
                found[name] = getattr(self, name)()
        if not found or self._tokens():
            found |= self.text(found)
        if "decoder_input_ids" in self.takes:
            found["decoder_input_ids"] = self.ids(TARGET)
        return found

    def _tokens(self) -> bool:
        return (
            "input_ids" in self.takes
            and self.model.main_input_name != "pixel_values"
            or "input_ids" in self.takes
            and hasattr(self.config, "text_config")
        )

    def ids(self, length: int) -> torch.Tensor:
        return torch.randint(3, 50, (BATCH, length), generator=self.random)

    def noise(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.random)

    def text(self, found: Mapping[str, Any]) -> dict[str, Any]:
        """Token ids, with as many placeholders as the pictures or sounds need."""
        ids = self.ids(LENGTH)
        for modality, key in (("image", "pixel_values"), ("audio", "input_features"), ("audio", "input_values")):
            token = self._token(modality)
            if key in found and token is not None:
                count = self._features(modality, key, found[key])
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

    def _features(self, modality: str, key: str, value: torch.Tensor) -> int:
        """How many placeholders one input of the batch takes."""
        get = getattr(self.model, f"get_{modality}_features")
        with torch.no_grad():
            out = get(value)
        out = getattr(out, "pooler_output", out)
        parts = list(out) if isinstance(out, list | tuple) else [out]
        total = sum(math.prod(part.shape[:-1]) for part in parts)
        return total // BATCH

    def pixel_values(self) -> torch.Tensor:
        for config in self._configs("vision_config", "backbone_config", "encoder"):
            size = getattr(config, "image_size", None) or 24
            height, width = (size, size) if isinstance(size, int) else size
            channels = getattr(config, "num_channels", None) or getattr(config, "in_channels", None) or 3
            return self.noise(BATCH, channels if isinstance(channels, int) else 3, height, width)
        raise AssertionError

    def input_features(self) -> torch.Tensor:
        for config in self._configs("audio_config", "encoder_config"):
            bins = next(
                (
                    getattr(config, n)
                    for n in ("num_mel_bins", "feature_size", "input_dim", "input_feat_per_channel")
                    if getattr(config, n, None)
                ),
                10,
            )
            positions = getattr(config, "max_source_positions", None)
            if re.search("whisper|qwen2_audio|voxtral", config.model_type):
                return self.noise(BATCH, bins, 2 * (positions or 32))
            return self.noise(BATCH, 31, bins)
        raise AssertionError

    def input_values(self) -> torch.Tensor:
        return self.noise(BATCH, 1600)

    def _configs(self, *names: str) -> list[Any]:
        found = [getattr(self.config, name) for name in names if getattr(self.config, name, None) is not None]
        return [*found, self.config]


def entries() -> list[Entry]:
    """Every model type, as an entry."""
    found: list[Entry] = []
    for model_type in CONFIG_MAPPING:
        choice = choose(model_type)
        if choice is not None and model_type not in UNBUILT:
            name, group = choice
            found.append(
                Entry(model_type, group, partial(build, model_type, name), partial(example, model_type), truth)
            )
    return found
