"""Inputs of models that follow no general rule, by the class of the model or by the name of the input."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .inputs import Inputs

Form = dict[str, torch.Tensor]
BATCH, LENGTH, TARGET, FRAMES, SOUND = 3, 7, 5, 31, 1600


def whole(inputs: Inputs) -> Form | None:
    """The whole call of a class that has an entry."""
    name = type(inputs.model).__name__
    return next((make(inputs) for pattern, make in WHOLE if re.fullmatch(pattern, name)), None)


def more(inputs: Inputs, found: Mapping[str, torch.Tensor]) -> Form:
    """Inputs by their names, where a model insists on them."""
    names = [name for name, one in inputs.takes.items() if name in NAMED and one.default is inspect.Parameter.empty]
    return {name: NAMED[name](inputs) for name in names if name not in found}


def _series(inputs: Inputs) -> Form:
    """Values with the features of their times, before and after now."""
    config = inputs.config
    past, future, features = config.context_length + max(config.lags_sequence), config.prediction_length, 2
    return {
        "past_values": inputs.noise(BATCH, past),
        "past_time_features": inputs.noise(BATCH, past, features),
        "past_observed_mask": torch.ones(BATCH, past),
        "future_values": inputs.noise(BATCH, future),
        "future_time_features": inputs.noise(BATCH, future, features),
    }


def _channels(inputs: Inputs) -> Form:
    return {"past_values": inputs.noise(BATCH, inputs.config.context_length, inputs.config.num_input_channels)}


def _forecast(inputs: Inputs) -> Form:
    length = 2 * inputs.config.patch_length
    padding = torch.zeros(BATCH, length, dtype=torch.long)
    found = {"past_values": inputs.noise(BATCH, length), "past_values_padding": padding}
    return found | ({"freq": torch.zeros(BATCH, 1, dtype=torch.long)} if "freq" in inputs.takes else {})


def _decisions(inputs: Inputs) -> Form:
    config = inputs.config
    return {
        "states": inputs.noise(BATCH, LENGTH, config.state_dim),
        "actions": inputs.noise(BATCH, LENGTH, config.act_dim),
        "rewards": inputs.noise(BATCH, LENGTH, 1),
        "returns_to_go": inputs.noise(BATCH, LENGTH, 1),
        "timesteps": torch.arange(LENGTH).expand(BATCH, LENGTH).contiguous(),
        "attention_mask": torch.ones(BATCH, LENGTH),
    }


def _queries(inputs: Inputs) -> Form:
    return {
        "query_embeds": inputs.noise(BATCH, TARGET, inputs.config.hidden_size),
        "encoder_hidden_states": inputs.noise(BATCH, LENGTH, inputs.config.encoder_hidden_size),
    }


def _flattened(inputs: Inputs) -> Form:
    """Patches behind the numbers of their row and column."""
    config = getattr(inputs.config, "vision_config", inputs.config)
    size = config.patch_embed_hidden_size
    place = torch.cartesian_prod(torch.arange(1.0, 4.0), torch.arange(1.0, 5.0)).expand(BATCH, 12, 2)
    found = {"flattened_patches": torch.cat([place, inputs.noise(BATCH, 12, size)], -1)}
    if "decoder_input_ids" in inputs.takes:
        found["decoder_input_ids"] = inputs.ids(TARGET)
    return found | {"attention_mask": torch.ones(BATCH, 12)}


def _naflex(inputs: Inputs) -> Form:
    """Pictures of any shape as rows of patches, with a mask and the shapes."""
    config = getattr(inputs.config, "vision_config", inputs.config)
    found = {
        "pixel_values": inputs.noise(BATCH, 12, 3 * config.patch_size**2),
        "pixel_attention_mask": torch.ones(BATCH, 12, dtype=torch.long),
        "spatial_shapes": torch.tensor([[3, 4]] * BATCH),
    }
    return ({"input_ids": inputs.ids(LENGTH)} if "input_ids" in inputs.takes else {}) | found


def _tiles(inputs: Inputs) -> Form:
    config, size = inputs.config, inputs.config.image_size
    return {
        "pixel_values": inputs.noise(BATCH, 1, config.max_num_tiles, 3, size, size),
        "aspect_ratio_ids": torch.full((BATCH, 1), 2),
        "aspect_ratio_mask": torch.tensor([1, 1, 0, 0]).expand(BATCH, 1, 4).contiguous(),
    }


def _positioned(inputs: Inputs) -> Form:
    """Patches with their places in the picture."""
    config = inputs.config
    side = 2 * config.pooling_kernel_size
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side)).expand(BATCH, side * side, 2).contiguous()
    return {
        "pixel_values": inputs.noise(BATCH, side * side, 3 * config.patch_size**2),
        "pixel_position_ids": places,
    }


def _regions(inputs: Inputs) -> Form:
    """Words, and regions of a picture with their boxes."""
    ids, config = inputs.ids(LENGTH), inputs.config
    return {
        "input_ids": ids,
        "visual_feats": inputs.noise(BATCH, TARGET, config.visual_feat_dim),
        "visual_pos": inputs.noise(BATCH, TARGET, config.visual_pos_dim),
        "attention_mask": torch.ones_like(ids),
    }


def _masked_pictures(inputs: Inputs) -> Form:
    """Words with a run of them that a picture fills."""
    config = inputs.config
    ids = inputs.ids(LENGTH + config.latent_query_num)
    mask = torch.zeros_like(ids)
    mask[:, 2 : 2 + config.latent_query_num] = 1
    pixels = (
        {"flattened_patches": _flattened(inputs)["flattened_patches"]}
        if "flattened_patches" in inputs.takes
        else {"pixel_values": inputs.noise(BATCH, 3, *[config.vision_config.image_size] * 2)}
    )
    return {
        **pixels,
        "input_ids": ids,
        "image_embeds_position_mask": mask,
        "attention_mask": torch.ones_like(ids),
    }


def _pairs(inputs: Inputs) -> Form:
    return {"pixel_values": torch.rand(BATCH, 2, 1, 48, 64, generator=inputs.random)}


def _codebooks(inputs: Inputs) -> Form:
    ids, channels = inputs.ids(LENGTH), inputs.config.decoder_config.num_channels
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "decoder_input_ids": torch.randint(3, 20, (BATCH, TARGET, channels), generator=inputs.random),
    }


def _mel(inputs: Inputs) -> Form:
    """A spectrum as a picture, with a word or two where the model wants them."""
    bins = getattr(inputs.config, "audio_config", inputs.config).num_mel_bins
    found = {"input_features": inputs.noise(BATCH, 1, 64, bins), "is_longer": torch.zeros(BATCH, 1, dtype=torch.bool)}
    return ({"input_ids": inputs.ids(LENGTH)} if "input_ids" in inputs.takes else {}) | found


def _patches(inputs: Inputs) -> Form:
    config = inputs.config
    return {"pixel_values": inputs.noise(BATCH, config.num_position_embeddings, 3 * config.patch_size**2)}


def _films(inputs: Inputs) -> Form:
    """Several pictures of each film, beside words or in a row of their own."""
    config = getattr(inputs.config, "vision_config", inputs.config)
    frames, size = config.num_frames, config.image_size
    if "input_ids" not in inputs.takes:
        return {"pixel_values": inputs.noise(BATCH * frames, 3, size, size)}
    return {"input_ids": inputs.ids(LENGTH), "pixel_values": inputs.noise(BATCH, frames, 3, size, size)}


def _spoken(inputs: Inputs) -> Form:
    ids = inputs.ids(LENGTH)
    bins = inputs.config.decoder_config.feature_size
    return {
        "input_ids": ids,
        "input_features": inputs.noise(BATCH, bins, FRAMES),
        "attention_mask": torch.ones_like(ids),
    }


def _in_context(inputs: Inputs) -> Form:
    """A picture, and another one with its mask as the question."""
    size = inputs.config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    half = (BATCH, 3, height // 2, width)
    return {name: inputs.noise(*half) for name in ("pixel_values", "prompt_pixel_values", "prompt_masks")}


def _pictures_of_text(inputs: Inputs) -> Form:
    ids, size = inputs.ids(LENGTH), inputs.config.vision_config.image_size
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": inputs.noise(BATCH, 1, 3, size, size),
        "image_attention_mask": torch.ones(BATCH, LENGTH, 1, dtype=torch.long),
    }


def _sung(inputs: Inputs) -> Form:
    """Words, and the codes of several books one under the other."""
    ids, books = inputs.ids(LENGTH), inputs.config.decoder.num_codebooks
    codes = torch.randint(3, 50, (BATCH * books, TARGET), generator=inputs.random)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": codes}


def _words(inputs: Inputs) -> Form:
    ids = inputs.ids(LENGTH)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


WHOLE: tuple[tuple[str, Callable[[Inputs], Form]], ...] = (
    (r"(Informer|Autoformer|TimeSeriesTransformer).*", _series),
    (r"PatchTS.*", _channels),
    (r"TimesFm.*", _forecast),
    (r"DecisionTransformer.*", _decisions),
    (r"Blip2QFormerModel", _queries),
    (r"Pix2Struct(VisionModel|ForConditionalGeneration)", _flattened),
    (r"Siglip2(?!.*Text).*", _naflex),
    (r"MllamaVisionModel", _tiles),
    (r"Gemma4VisionModel", _positioned),
    (r"Lxmert.*", _regions),
    (r"Kosmos2(?!.*Text).*", _masked_pictures),
    (r"SuperGlue.*|LightGlue.*|EfficientLoFTR.*", _pairs),
    (r"Dia.*", _codebooks),
    (r"Clap(?!.*Text).*", _mel),
    (r"GraniteSpeech.*Encoder", lambda inputs: {"hidden_states": inputs.noise(BATCH, FRAMES, inputs.config.input_dim)}),
    (r"Molmo2VisionModel", _patches),
    (r"XCLIP(?!.*Text).*", _films),
    (r"ClvpModelForConditionalGeneration", _spoken),
    (r"SegGpt.*", _in_context),
    (r"Chameleon.*", _words),  # pictures become tokens by the nearest entry of a book
    (r"PerceiverModel", lambda inputs: {"inputs": inputs.noise(BATCH, LENGTH, inputs.config.d_model)}),
    (r"Musicgen(Melody)?ForConditionalGeneration", _sung),
    (r"Idefics(Model|ForVisionText2Text)", _pictures_of_text),
)
NAMED: dict[str, Callable[[Inputs], torch.Tensor]] = {
    "qformer_input_ids": lambda inputs: inputs.ids(TARGET),
    "task_inputs": lambda inputs: inputs.noise(BATCH, inputs.config.task_seq_len),
}
