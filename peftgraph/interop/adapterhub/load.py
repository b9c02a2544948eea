"""Reads directories that the `adapters` library saved, as passes with their trained parameters.

Read are bottlenecks (after a sublayer, on the residual sum, beside a sublayer) with an invertible adapter or without,
Compacter, LoRA, DoRA, VeRA, MTL-LoRA, (IA)3, LoReFT and NoReFT, prefixes, prompts, and unions of these; where all
members of a union have gates it is UniPELT.
Source: adapter-hub/adapters 1.3, configuration/adapter_config.py, model_mixin.py (EmbeddingAdaptersWrapperMixin).
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from peftgraph.errors import AdapterError, warn
from peftgraph.interop.adapterhub.bottlenecks import bottleneck_pass
from peftgraph.interop.adapterhub.heads import head_passes
from peftgraph.interop.adapterhub.invertible import invertible_passes
from peftgraph.interop.adapterhub.low_rank import low_rank_pass, scale_pass
from peftgraph.interop.adapterhub.prefixes import prefix_passes
from peftgraph.interop.adapterhub.prompts import prompt_pass
from peftgraph.interop.adapterhub.reft import reft_pass
from peftgraph.interop.adapterhub.saved_adapter import SavedAdapter
from peftgraph.ir.program import ProgramData
from peftgraph.passes import UniPELT
from peftgraph.rewrite.method import ParameterKey, PassWithValues
from peftgraph.sites import Sites


def read_adapterhub(program: ProgramData, sites: Sites, directory: Path) -> list[PassWithValues]:
    """Return the passes that a directory of the library describes, with their parameters.

    Raises:
        AdapterError: the files are damaged, belong to another base, or describe what no pass does.
    """
    saved = SavedAdapter.read(directory)
    try:
        passes = _passes(program, sites, saved)
        trained, remark = head_passes(program, sites, saved)
    except (RuntimeError, IndexError, TypeError, ZeroDivisionError) as error:
        raise AdapterError(f"{directory} is damaged: its tensors do not fit one another: {error}") from None
    if remark:
        warn(remark)
    return passes + trained


def _passes(program: ProgramData, sites: Sites, saved: SavedAdapter) -> list[PassWithValues]:
    """Return the passes of a directory; passes that change the embeddings come first."""
    first = invertible_passes(saved)
    found = [(part, member) for member in saved.members() for part in _passes_of(program, sites, member)]
    parts = [part for part, _ in found]
    gated = [part for part, member in found if member.options.get("use_gating")]
    if not gated:
        return [*first, *parts]
    values: dict[ParameterKey, Tensor] = {key: value for part in gated for key, value in part.values.items()}
    method = UniPELT(methods=tuple(part.method for part in gated), gates="site")
    return [*first, PassWithValues(method, values), *(part for part in parts if part not in gated)]


def _passes_of(program: ProgramData, sites: Sites, saved: SavedAdapter) -> list[PassWithValues]:
    """Return the passes of one configuration."""
    match saved.options.get("architecture"):
        case None:
            return [bottleneck_pass(sites, saved)]
        case "lora" | "mtl_lora" if saved.options.get("composition_mode") == "add":
            return [low_rank_pass(program, sites, saved)]
        case "lora":
            return [scale_pass(program, sites, saved)]
        case "reft":
            return [reft_pass(sites, saved)]
        case "prefix_tuning":
            return prefix_passes(sites, saved)
        case "prompt_tuning":
            return [prompt_pass(program, sites, saved)]
        case other:
            raise saved.refuse(f"architecture={other!r}")
