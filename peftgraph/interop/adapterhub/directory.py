"""Directories that the `adapters` library saved, as passes with their trained parameters.

Read are bottlenecks (after a sublayer, on the residual sum, beside a sublayer) with an invertible adapter or without,
Compacter, LoRA, DoRA, VeRA, MTL-LoRA, (IA)3, LoReFT and NoReFT, prefixes, prompts, and unions of these; where all
members of a union have gates it is UniPELT.
Source: adapter-hub/adapters 1.3, configuration/adapter_config.py, model_mixin.py (EmbeddingAdaptersWrapperMixin).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

from torch import Tensor

from peftgraph.errors import AdapterError, warn
from peftgraph.interop.adapterhub.bottlenecks import bottlenecks
from peftgraph.interop.adapterhub.couplings import couplings
from peftgraph.interop.adapterhub.heads import head
from peftgraph.interop.adapterhub.low_rank import low_rank, scales
from peftgraph.interop.adapterhub.prefixes import prefixes
from peftgraph.interop.adapterhub.prompts import prompt
from peftgraph.interop.adapterhub.reft import edits
from peftgraph.interop.adapterhub.saved import Saved
from peftgraph.interop.documents import read_json
from peftgraph.interop.filling import Filled, Key, fill, renamed
from peftgraph.interop.peft.config import CONFIG
from peftgraph.ir.program import ProgramData
from peftgraph.rewrite.registry import find_pass
from peftgraph.sites import Sites

P = TypeVar("P", bound=ProgramData)


def is_adapters(directory: Path) -> bool:
    """Whether a directory holds the library's files: its configuration has the model's class beside the options."""
    found = read_json(directory / CONFIG, missing=f"{directory} holds no {CONFIG}.")
    return isinstance(found, dict) and "model_class" in found and isinstance(found.get("config"), dict)


def load_adapters(program: P, sites: Sites, apply: Callable[..., P], directory: Path, name: str | None) -> P:
    """The program after the pass that a directory of the library stands for, with its parameters.

    Raises:
        AdapterError: the files are damaged, fit another base, or say what no pass does.
    """
    saved = Saved.read(directory)
    try:
        parts = _parts(program, sites, saved)
        trained, remark = head(program, sites, saved)
    except (RuntimeError, IndexError, TypeError, ZeroDivisionError) as error:
        raise AdapterError(f"{directory} is damaged: its tensors do not fit one another: {error}") from None
    for words in filter(None, (remark, *(part.remark for part in parts))):
        warn(words)
    parts += trained
    methods = renamed([part.method for part in parts], name, directory)
    named = [replace(part, method=method) for part, method in zip(parts, methods, strict=True)]
    return fill(program, apply, named, directory)


def _parts(program: ProgramData, sites: Sites, saved: Saved) -> list[Filled]:
    """The passes of a directory; what changes the embeddings comes first."""
    first = couplings(saved)
    found = [(part, member) for member in saved.members() for part in _of(program, sites, member)]
    parts = [part for part, _ in found]
    gated = [part for part, member in found if member.options.get("use_gating")]
    if not gated:
        return [*first, *parts]
    values: dict[Key, Tensor] = {key: value for part in gated for key, value in part.values.items()}
    method = cast(Any, find_pass("unipelt"))(methods=tuple(part.method for part in gated), gates="site")
    return [*first, Filled(method, values), *(part for part in parts if part not in gated)]


def _of(program: ProgramData, sites: Sites, saved: Saved) -> list[Filled]:
    """The pass of one configuration, or the passes."""
    match saved.options.get("architecture"):
        case None:
            return [bottlenecks(sites, saved)]
        case "lora" | "mtl_lora" if saved.options.get("composition_mode") == "add":
            return [low_rank(program, sites, saved)]
        case "lora":
            return [scales(program, sites, saved)]
        case "reft":
            return [edits(sites, saved)]
        case "prefix_tuning":
            return prefixes(sites, saved)
        case "prompt_tuning":
            return [prompt(program, sites, saved)]
        case other:
            raise saved.refuse(f"architecture={other!r}")
