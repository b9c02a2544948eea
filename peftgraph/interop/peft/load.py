"""Reads directories that peft's save_pretrained wrote, as passes with their trained parameters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from peftgraph.errors import AdapterError
from peftgraph.interop.peft.config import PeftConfig
from peftgraph.interop.peft.read_adalora import adalora_passes
from peftgraph.interop.peft.read_base_parameters import base_parameter_passes
from peftgraph.interop.peft.read_low_rank import low_rank_passes
from peftgraph.interop.peft.read_prompts import adaption_passes, prefix_passes, prompt_passes, ptuning_passes
from peftgraph.interop.peft.read_scales import scale_passes
from peftgraph.interop.peft.read_tokens import token_passes
from peftgraph.interop.peft.tensors import PeftTensors
from peftgraph.ir.program import ProgramData
from peftgraph.rewrite.method import PassWithValues
from peftgraph.sites import Sites

Reader = Callable[[ProgramData, Sites, PeftConfig, PeftTensors], list[PassWithValues]]

READERS: dict[str, Reader] = {
    "LORA": low_rank_passes,
    "ADALORA": adalora_passes,
    "TRAINABLE_TOKENS": token_passes,
    "IA3": scale_passes,
    "PREFIX_TUNING": prefix_passes,
    "PROMPT_TUNING": prompt_passes,
    "P_TUNING": ptuning_passes,
    "ADAPTION_PROMPT": adaption_passes,
}
MODULES = ("LORA", "ADALORA", "IA3")  # the methods whose target_modules are projections


def read_peft(program: ProgramData, sites: Sites, directory: Path) -> list[PassWithValues]:
    """Return the passes that a peft directory describes, with their parameters.

    Args:
        program: what the adapter is to be applied to.
        sites: its sites.
        directory: what peft wrote.

    Raises:
        AdapterError: the files are damaged, belong to another base, or describe what no pass does.
    """
    config = PeftConfig.read(directory)
    tensors = PeftTensors.read(config)
    _check_complete(sites, config, tensors)
    try:
        return _passes(program, sites, config, tensors)
    except (RuntimeError, IndexError, KeyError, TypeError, ArithmeticError) as error:  # of shapes, dtypes and options
        raise AdapterError(f"{directory} is damaged: its tensors or options do not fit one another: {error}") from error


def _passes(program: ProgramData, sites: Sites, config: PeftConfig, tensors: PeftTensors) -> list[PassWithValues]:
    """Return the passes of the method, of tokens that train along with a LoRA, and of the base's own parameters."""
    passes = READERS[config.method](program, sites, config, tensors)
    passes += token_passes(program, sites, config, tensors) if config.method == "LORA" else []
    return passes + base_parameter_passes(program, sites, config, tensors)


def _check_complete(sites: Sites, config: PeftConfig, tensors: PeftTensors) -> None:
    """Check that the file has the tensors of every target; peft would randomly initialise a missing one.

    Raises:
        AdapterError: it lacks those of a target.
    """
    if config.options.get("target_modules") in (None, "all-linear") or config.method not in MODULES:
        return
    stored = {path for path, _ in tensors.modules}
    weights = (site.weight.parameter for site in sites if site.weight)
    for path in (name.removesuffix(".weight") for name in weights if name.endswith(".weight")):
        if path not in stored and config.selects(path):
            raise AdapterError(f"{config.directory}: target_modules selects {path}, of which the file has no tensors.")
