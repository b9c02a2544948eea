"""Directories that peft's save_pretrained wrote, as passes with their trained parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from peftgraph.errors import AdapterError
from peftgraph.interop.filling import Filled, fill, renamed
from peftgraph.interop.peft.config import PeftConfig
from peftgraph.interop.peft.low_rank import low_rank_parts
from peftgraph.interop.peft.rows import adaption_parts, prefix_parts, prompt_parts, ptuning_parts
from peftgraph.interop.peft.scales import scale_parts
from peftgraph.interop.peft.stored import stored_parts
from peftgraph.interop.peft.tensors import PeftTensors
from peftgraph.interop.peft.tokens import token_parts
from peftgraph.ir.program import ProgramData
from peftgraph.sites import Sites

P = TypeVar("P", bound=ProgramData)
Reader = Callable[[ProgramData, Sites, PeftConfig, PeftTensors], list[Filled]]

READERS: dict[str, Reader] = {
    "LORA": low_rank_parts,
    "TRAINABLE_TOKENS": token_parts,
    "IA3": scale_parts,
    "PREFIX_TUNING": prefix_parts,
    "PROMPT_TUNING": prompt_parts,
    "P_TUNING": ptuning_parts,
    "ADAPTION_PROMPT": adaption_parts,
}


MODULES = ("LORA", "IA3")  # the methods whose target_modules are projections


def load_peft(program: P, sites: Sites, apply: Callable[..., P], directory: Path, name: str | None) -> P:
    """The program after the passes that a peft directory stands for, with their parameters.

    Args:
        program: what the adapter is put on.
        sites: its sites.
        apply: its verb that applies passes.
        directory: what peft wrote.
        name: a name for the passes.

    Raises:
        AdapterError: the files are damaged, fit another base, or say what no pass does.
    """
    config = PeftConfig.read(directory)
    tensors = PeftTensors.read(config)
    _check_complete(sites, config, tensors)
    try:
        parts = _parts(program, sites, config, tensors)
    except (RuntimeError, IndexError, KeyError, TypeError, ArithmeticError) as error:  # of shapes, dtypes and options
        raise AdapterError(f"{directory} is damaged: its tensors or options do not fit one another: {error}") from error
    if not parts:
        raise AdapterError(f"{directory} holds no tensors.")
    methods = renamed([part.method for part in parts], name, directory)
    named = [replace(part, method=method) for part, method in zip(parts, methods, strict=True)]
    return fill(program, apply, named, directory)


def _parts(program: ProgramData, sites: Sites, config: PeftConfig, tensors: PeftTensors) -> list[Filled]:
    """The passes, with what trains beside them."""
    kind = config.of("peft_type", str, "")
    parts = READERS[kind](program, sites, config, tensors)
    parts += token_parts(program, sites, config, tensors) if kind == "LORA" else []
    return parts + stored_parts(program, sites, config, tensors)


def _check_complete(sites: Sites, config: PeftConfig, tensors: PeftTensors) -> None:
    """Refuses a file that lacks a target's tensors: peft would start that one anew."""
    if config.options.get("target_modules") in (None, "all-linear") or config.of("peft_type", str, "") not in MODULES:
        return
    held = {path for path, _ in tensors.modules}
    weights = (site.weight.parameter for site in sites if site.weight)
    for path in (name.removesuffix(".weight") for name in weights if name.endswith(".weight")):
        if path not in held and config.selects(path):
            raise AdapterError(f"{config.directory}: target_modules selects {path}, of which the file has no tensors.")
