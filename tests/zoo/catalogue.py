"""All entries of the zoo: transformers' types, hand-written models, and those of other libraries that are installed."""

from __future__ import annotations

import importlib.util

from . import diffusion, hand_attention, hand_convolutions, hand_models, models, packages, timm_models, torch_nn
from .entry import Entry


def entries(everything: bool = True) -> list[Entry]:
    """Every entry, or of transformers' types the chosen ones alone."""
    found = [*models.entries(everything), *hand_attention.ENTRIES, *hand_models.ENTRIES, *hand_convolutions.ENTRIES]
    found += torch_nn.ENTRIES + packages.ENTRIES
    if importlib.util.find_spec("diffusers"):
        found += diffusion.ENTRIES
    if importlib.util.find_spec("timm"):
        found += timm_models.ENTRIES
    return found
