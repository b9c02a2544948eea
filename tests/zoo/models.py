"""The model types of transformers as entries of the zoo: which class of a type is built, and with which example."""

from __future__ import annotations

import importlib.util
import inspect
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
from .inputs import accepted
from .known import CHOSEN, UNBUILT
from .overrides import CLASSES, PARTS
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
    inner = _unmapped(model_type)
    return None if inner is None else (inner, "multimodal")


def _unmapped(model_type: str) -> str | None:
    """The class of a type that only exists inside another model: the first that takes its configuration."""
    kind = CONFIG_MAPPING[model_type]
    name = kind.__module__.replace("configuration_", "modeling_")
    if importlib.util.find_spec(name) is None:
        return None
    module = importlib.import_module(name)
    for name, value in vars(module).items():
        own = inspect.isclass(value) and issubclass(value, PreTrainedModel) and value.__module__ == module.__name__
        if own and value.config_class is kind and "forward" in vars(value) and hasattr(transformers, name):
            return name
    return None


def build(model_type: str, name: str) -> nn.Module:
    """The tiny random model of a type, in training mode."""
    torch.manual_seed(0)
    config = small_config(model_type)
    config = getattr(config, PARTS[model_type]) if model_type in PARTS else config
    return getattr(transformers, name)(config)


def example(model: nn.Module) -> dict[str, Any]:
    """Keyword inputs of one call of `model`: the first of several forms that it accepts."""
    return accepted(model)


def entries(everything: bool = True) -> list[Entry]:
    """Every model type that can be built, or the chosen ones, as entries."""
    found: list[Entry] = []
    for model_type in CONFIG_MAPPING:
        if model_type in UNBUILT or not (everything or model_type in CHOSEN):
            continue
        choice = choose(model_type)
        if choice is not None:
            name, group = choice
            found.append(Entry(model_type, group, partial(build, model_type, name), example, truth))
    return found
